"""Hugging Face folders of the Llama family in and out: tensors that are packed here and apart there."""

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from handgrad.cli.__main__ import main
from handgrad.core.dtypes import I32
from handgrad.core.errors import HandgradError
from handgrad.core.params import ONES
from handgrad.infer.load import open_source
from handgrad.io import hf
from handgrad.io.format import NEUTRAL, Format
from handgrad.models import GPT2, register, registry
from handgrad.models.llama_format import HUGGING_FACE, KEYS
from handgrad.models.model import Batch
from handgrad.ops import embed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

FORM = Format(**HUGGING_FACE)
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SIZES = dict(
    vocab_size=97,
    hidden_size=33,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shapes(f):
    """Name and shape of every tensor of a model with these fields, as the family declares them."""
    f = SimpleNamespace(**f)
    C, q, kv = f.hidden_size, f.num_heads * f.head_size, f.num_kv_heads * f.head_size
    found = {"wte.weight": (f.vocab_size, C)}
    for i in range(f.num_layers):
        block = {"ln_1.weight": (C,), "attn.qkv.weight": (q + 2 * kv, C)}
        if f.qkv_bias:
            block["attn.qkv.bias"] = (q + 2 * kv,)
        if f.qk_norm:
            block |= {"attn.q_norm.weight": (f.head_size,), "attn.k_norm.weight": (f.head_size,)}
        block |= {"attn.out.weight": (C, q), "ln_2.weight": (C,)}
        block |= {"mlp.gate_up.weight": (2 * f.mlp_size, C), "mlp.down.weight": (C, f.mlp_size)}
        found |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    found["ln_f.weight"] = (C,)
    return found if f.tie_embeddings else found | {"lm_head.weight": (f.vocab_size, C)}


def torch_model(kind, **changes):
    torch.manual_seed(1)
    sizes = {**SIZES, "hidden_size": 36, **changes}
    model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(
        getattr(transformers, f"{KINDS[kind]}Config")(**sizes)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return model


def read(folder):
    fields = hf.read_fields(folder, FORM)
    return hf.read(folder, FORM, fields, shapes(fields))


def loaded(folder, kind):
    """transformers' model of a folder, which must lack no tensor and have none too many."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == f"{KINDS[kind]}ForCausalLM"
    return model.eval()


def reconfigure(folder, drop=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def told(what, *args):
    with pytest.raises(HandgradError) as error:
        what(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


CASES = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "one key/value head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_in_and_out_is_bit_exact(tmp_path, case, dtype):
    kind, changes = CASES[case]
    model = torch_model(kind, **changes).to(dtype)
    model.save_pretrained(tmp_path / "in")
    weights = read(tmp_path / "in")
    assert weights.dtype == {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    (tmp_path / "out").mkdir()
    hf.write(tmp_path / "out", FORM, weights)
    kind = "llama" if case == "mistral without a window" else kind  # the more general name for it
    again = loaded(tmp_path / "out", kind)
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(20)[None] % 97
    with torch.no_grad():  # the configs compute the same; `to` has rounded the frequencies of `model`
        assert torch.equal(again(ids).logits, loaded(tmp_path / "in", CASES[case][0])(ids).logits)


def test_q_k_and_v_are_rows_in_this_order(tmp_path):
    model = torch_model("qwen2")
    model.save_pretrained(tmp_path)
    weights, theirs = read(tmp_path), model.state_dict()
    for kind in ("weight", "bias"):
        parts = [theirs[f"model.layers.1.self_attn.{c}_proj.{kind}"].numpy() for c in "qkv"]
        packed = weights.tensor(f"h.1.attn.qkv.{kind}")
        assert np.array_equal(packed[:60], parts[0]) and np.array_equal(packed[60:80], parts[1])
        assert np.array_equal(packed[80:], parts[2])
    gate, up = (theirs[f"model.layers.0.mlp.{name}_proj.weight"].numpy() for name in ("gate", "up"))
    assert np.array_equal(weights.tensor("h.0.mlp.gate_up.weight"), np.concatenate([gate, up]))


def test_parts_of_several_dtypes_become_float32(tmp_path):
    torch_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    kinds = [torch.float16, torch.bfloat16, torch.float32]
    tensors = {name: x.to(kinds[i % 3]) for i, (name, x) in enumerate(tensors.items())}
    save_file(tensors, path)
    weights = read(tmp_path)
    assert weights.dtype == "f32"
    parts = [tensors[f"model.layers.0.self_attn.{c}_proj.weight"].float() for c in "qkv"]
    assert np.array_equal(weights.tensor("h.0.attn.qkv.weight", "f32"), torch.cat(parts).numpy())


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    """A packed tensor may end in another file than it begins."""
    model = torch_model("qwen3")
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(hf, "MOST_FILE", 10_000)
    hf.write(tmp_path / "out", FORM, read(tmp_path / "in"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    assert where["model.layers.0.self_attn.q_proj.weight"] != where["model.layers.0.self_attn.v_proj.weight"]
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for name in files:
        tensors = load_file(tmp_path / "out" / name)
        assert len(tensors) == 1 or sum(4 * x.numel() for x in tensors.values()) <= 10_000
    ours, theirs = loaded(tmp_path / "out", "qwen3").state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    first = read(tmp_path / "in")
    assert all(np.array_equal(read(tmp_path / "out").tensor(name), first.tensor(name)) for name in first.shapes)


def test_older_spellings_of_rotary_positions(tmp_path):
    torch_model("llama", rope_parameters=LLAMA3).save_pretrained(tmp_path)
    new = hf.read_fields(tmp_path, FORM)
    assert new["rope_theta"] == 500000.0 and new["rope_scaling"] == (32.0, 1.0, 4.0, 8192)
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    for name in ("rope_type", "type"):
        scaling = {name: "llama3"} | old
        reconfigure(tmp_path, drop=["rope_parameters"], rope_theta=500000.0, rope_scaling=scaling)
        assert hf.read_fields(tmp_path, FORM) == new
    reconfigure(tmp_path, rope_scaling=None, rope_theta=10000)
    found = hf.read_fields(tmp_path, FORM)
    assert found["rope_scaling"] is None and found["rope_theta"] == 10000.0
    assert transformers.LlamaConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path, kind):
    """Every key of its own, left out: our field is the attribute that transformers then has."""
    keys = {ours: key for ours, (key, _) in FORM.fields.items()} | KEYS
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    default = getattr(transformers, f"{KINDS[kind]}Config")()
    found = hf.read_fields(tmp_path, FORM)
    for ours in keys.keys() - {"head_size"}:
        assert found[ours] == getattr(default, keys[ours]), ours
    width = default.hidden_size // default.num_attention_heads
    assert found["head_size"] == (getattr(default, "head_dim", None) or width)
    assert found["rope_theta"] == default.rope_parameters["rope_theta"]
    assert found["window"] == (getattr(default, "sliding_window", None) or 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_config_is_read_or_changes_nothing(kind):
    """A key that a later transformers adds shows here."""
    fields = {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3", "window": 4 if kind == "mistral" else 0}
    fields |= {"num_layers": 2, "rope_theta": 1.0, "rope_scaling": None}
    fields |= dict.fromkeys("vocab_size max_seq_len num_kv_heads head_size mlp_size".split())
    read = {key for key, _ in FORM.fields.values()} | FORM.only(fields).keys() | NEUTRAL.keys()
    read |= FORM.encode(fields).keys()
    names_or_training = {"transformers_version", "architectures", "dtype", "initializer_range", "use_cache"}
    outputs = {"output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"}
    ends = {"bos_token_id", "eos_token_id", "pad_token_id"}
    unused = {"chunk_size_feed_forward", "pretraining_tp"}  # by the code of their models
    own = set(vars(getattr(transformers, f"{KINDS[kind]}Config")())) - {"_name_or_path"}
    own = {key for key in own if not key.startswith("_")}
    assert own - read - names_or_training - outputs - ends - unused == set()


@pytest.mark.parametrize(
    ("kind", "changes", "part"),
    [
        ("llama", {"attention_bias": True}, "has attention_bias False, but got True."),
        ("llama", {"mlp_bias": True}, "has mlp_bias False, but got True."),
        ("llama", {"hidden_act": "gelu"}, "has hidden_act silu or swish, but got gelu."),
        ("llama", {"sliding_window": 4}, "config.json has no sliding_window, which a llama has not, but got 4."),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "a rope_type default or llama3, but got yarn.",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "a rope_type default or llama3, but got linear.",
        ),
        ("llama", {"rope_scaling": [1]}, "has rope_parameters that are an object, but got [1]."),
        ("llama", {"rope_scaling": {"full_attention": {}}}, "a key that is unknown here, but got full_attention."),
        ("llama", {"partial_rotary_factor": 0.5}, "has a partial_rotary_factor of 1, but got 0.5."),
        ("mistral", {"sliding_window": 0}, "has a sliding_window of at least 1, or none, but got 0."),
        ("mistral", {"sliding_window": "4"}, "has a sliding_window of at least 1, or none, but got 4."),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types that are alike"),
        ("qwen2", {"layer_types": 7}, "has layer_types that are alike"),
        ("qwen2", {"layer_types": ["linear_attention"] * 2}, "has layer_types full_attention or sliding_attention"),
        ("qwen3", {"attention_bias": True}, "has attention_bias False, but got True."),
        ("qwen3", {"quantization_config": {}}, "has quantization_config None, but got {}."),
    ],
)
def test_configs_that_no_kernel_computes_are_refused(tmp_path, kind, changes, part):
    torch_model(kind).save_pretrained(tmp_path)
    reconfigure(tmp_path, **changes)
    line = told(read, tmp_path)
    assert line.startswith("[hf] ") and part in line


def test_a_window_from_some_layer_on_is_refused(tmp_path):
    """max_window_layers, in files without layer_types."""
    torch_model("qwen2").save_pretrained(tmp_path)
    window = {"use_sliding_window": True, "sliding_window": 4}
    reconfigure(tmp_path, drop=["layer_types"], **window, max_window_layers=1)
    assert "has layer_types that are alike: a model here has one window" in told(read, tmp_path)
    reconfigure(tmp_path, max_window_layers=0)
    assert read(tmp_path).fields["window"] == 4
    for changes in ({"max_window_layers": 2}, {"use_sliding_window": False}, {"sliding_window": None}):
        reconfigure(tmp_path, **window | {"max_window_layers": 0} | changes)
        assert read(tmp_path).fields["window"] == 0


def test_errors_name_the_part_of_a_packed_tensor(tmp_path):
    torch_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(tensors | {name: torch.zeros(10, 36)}, path)
    assert f"{name} in {tmp_path} has shape (20, 36), but got (10, 36)." in told(read, tmp_path)
    save_file({key: x for key, x in tensors.items() if key != name}, path)
    assert f"holds the tensor {name}, but got no such." in told(read, tmp_path)


def test_an_old_files_frequencies_and_missing_prefix(tmp_path):
    model = torch_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {name.removeprefix("model."): x for name, x in load_file(path).items()}
    save_file(old | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}, path)
    weights = read(tmp_path)
    assert np.array_equal(weights.tensor("wte.weight"), model.state_dict()["lm_head.weight"].numpy())


def test_a_tied_model_whose_head_differs_is_untied(tmp_path):
    torch_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    assert hf.read_fields(tmp_path, FORM)["tie_embeddings"] is False
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert hf.read_fields(tmp_path, FORM)["tie_embeddings"] is True


def test_a_family_that_transformers_lacks_is_refused():
    with pytest.raises(HandgradError, match="has no Llama with both qkv_bias and qk_norm"):
        FORM.config({"qkv_bias": True, "qk_norm": True})


# by command, through a stand-in for the family that has its tensors and computes something else ------------------------


@dataclass(frozen=True)
class StandIn:
    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    head_size: int
    mlp_size: int
    rope_theta: float
    rope_scaling: tuple | None
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    window: int

    family: ClassVar[str] = "stand-in"
    hugging_face: ClassVar = HUGGING_FACE

    def inputs(self, g, batch_size, seq_len, *, cache=0):
        return Batch(g.input("ids", (batch_size * seq_len,), I32), batch_size, seq_len, cache)

    def body(self, g, data):
        made = {name: g.param(name, shape, ONES) for name, shape in shapes(asdict(self)).items()}
        return g.emit(embed, data.ids, made["wte.weight"], None, None, T=data.seq_len, decode=False, scale=1.0)

    def logits(self, g, x):
        return g.output("logits", x)


@pytest.mark.parametrize("kind", KINDS)
def test_model_types_of_one_family_by_command(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(registry, "FAMILIES", {"gpt2": GPT2})
    register(StandIn)
    with pytest.raises(HandgradError, match="stand-in reads Hugging Face's '(llama|mistral|qwen2|qwen3)'"):
        register(type("Other", (StandIn,), {"family": "other"}))
    model = torch_model(kind)
    model.save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "run"), "--to", "handgrad"]) == 0
    assert json.loads((tmp_path / "run" / "step_000000" / "run.json").read_text())["family"] == "stand-in"
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"]) == 0
    ours, theirs = loaded(tmp_path / "out", kind).state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    reconfigure(tmp_path / "in", model_type="t5")
    line = "has the model_type gpt2 or llama or mistral or qwen2 or qwen3, but got 't5'."
    assert line in told(open_source, tmp_path / "in")
