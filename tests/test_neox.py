"""GPT-NeoX: against transformers, by finite differences, and as a folder in and out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.core.backward import POLICIES
from handgrad.core.errors import HandgradError
from handgrad.infer import Sampling
from handgrad.infer.load import TOKENIZER, load_run, open_source
from handgrad.io import hf
from handgrad.io.format import NEUTRAL, Format
from handgrad.models import GPTNeoX, declare, forward_loss, from_dict, preset, to_dict
from handgrad.ops import attention_backward
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.start import Start, initialize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

parity = pytest.importorskip("parity", reason="it needs PyTorch and transformers")

EXACT = 1e-5  # of float32 logits: both forms of GELU differ by 8e-5 here, so a bound of 1e-4 would not tell them apart
CASES = [name for name, case in parity.CASES.items() if case.config is transformers.GPTNeoXConfig]
FORM = Format(**GPTNeoX.hugging_face)
SMALL = GPTNeoX(vocab_size=23, max_seq_len=20, num_layers=2, num_heads=3, hidden_size=36, mlp_size=20, rotary_pct=0.5)
KINDS = {
    "parallel": SMALL,
    "sequential": replace(SMALL, parallel=False),
    "tied, all columns rotate": replace(SMALL, tie_embeddings=True, rotary_pct=1.0, act="gelu_new"),
}


# PyTorch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_steps_equal_transformers(name, text):
    found = parity.compare(parity.CASES[name], text)
    error, whose = found.worst_gradient
    print(f"{name}: logits {found.errors['logits']:.1e}, gradients {error:.1e} {whose}, losses {found.loss:.1e}")
    assert isinstance(found.model, GPTNeoX) and len(CASES) == 2
    assert found.errors["logits"] <= EXACT and error <= 1e-4 and found.loss <= 1e-4
    assert found.ours[-1] < found.ours[0] - 0.02


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_bf16_and_a_gpu_equal_transformers(name, backend, dtype, text):
    """bf16 rounds with a relative error of 1.6e-3 in root mean square.

    A gradient passes about 24 rounded tensors a layer: forward and backward n, qkv, its rotation, y and the projection
    of the attention, n, the MLP before and after its activation and its projection, the sum of both branches, and the
    stream twice. Independent errors add in squares: sqrt(2 x 24) x 1.6e-3 = 1.1e-2 for the median tensor. A score of 2,
    rounded, moves its probability by twice as much, so single tensors of q and k may have 2.2e-2.
    """
    found = parity.compare(parity.CASES[name], text, backend=backend, dtype=dtype)
    errors = list(found.errors.values())
    median, worst = (1e-4, 1e-4) if dtype == "f32" else (1.1e-2, 2.2e-2)
    assert np.median(errors) <= median and max(errors) <= worst, found.worst_gradient
    assert found.loss <= median and found.ours[-1] < found.ours[0] - 0.02


WRONG = {
    "rope_theta": {"rope_theta": 9e2},
    "rotary_pct": {"rotary_pct": 0.15},
    "act": {"act": "gelu"},
    "parallel": {"parallel": True},
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_field_is_caught(change, text, monkeypatch):
    right = parity.tensors

    def wrong(inner, gradients=False):
        model, values = right(inner, gradients)
        return replace(model, **WRONG[change]), values

    monkeypatch.setattr(parity, "tensors", wrong)
    assert parity.compare(parity.CASES[CASES[1]], text).errors["logits"] > 4 * EXACT


def test_rows_of_q_k_and_v_in_their_order_are_caught(text, monkeypatch):
    """The trap of this family: without `order`, names and shapes fit, and every number is wrong."""
    monkeypatch.setattr(GPTNeoX, "hugging_face", dict(GPTNeoX.hugging_face) | {"order": None})
    assert parity.compare(parity.CASES[CASES[0]], text).errors["logits"] > 1e-2


# finite differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_finite_differences(name, policy):
    model = KINDS[name]

    def fill(p, arena):
        rng = np.random.default_rng(0)
        initialize(p, arena, Start(seed=1))
        for info in p.params.values():
            w = arena.part("param", info.tensor)[: info.init.rows]
            w += rng.normal(0, 0.2, w.shape)
        for t in p.inputs.values():
            arena.view(t)[...] = rng.integers(0, model.vocab_size, t.shape)
        arena.view(p.inputs["targets"])[3] = -1  # does not count
        set_scalars(p, arena)

    assert gradcheck(lambda p: forward_loss(p, model, 2, 9, 3), fill, POLICIES[policy]) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_what_backward_recomputes_changes_no_bit(name, one_pass):
    losses, grads = one_pass(KINDS[name], policy="none")
    for policy in ("act", "act_norm", "block"):
        again, other = one_pass(KINDS[name], policy=policy)
        assert np.array_equal(losses, again)
        assert all(np.array_equal(grads[tensor], other[tensor]) for tensor in grads)


def test_flops_of_a_token_are_those_of_the_calls():
    """As the same test of the Llamas: attention's backward computes one of its five products again."""
    for model in KINDS.values():
        wide = replace(model, vocab_size=128, max_seq_len=512, hidden_size=96, mlp_size=384)
        page = hg.explain(wide, 512, execution=hg.Execution(1, recompute="none"), remedies=False)
        needed = sum(c.flops * (0.8 if c.op is attention_backward else 1) for c in page.program.calls) / 512
        assert needed == pytest.approx(wide.flops_per_token(page.program.num_params, 512), rel=0.02)


# folders of Hugging Face's library ------------------------------------------------------------------------------------


def torch_model(**changes):
    case = parity.CASES[CASES[0]]
    return parity.WithLoss(replace(case, sizes=case.sizes | changes)).inner.eval()


def reconfigure(folder, drop=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "use_parallel_residual": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_folder_in_and_out_is_bit_exact(tmp_path, dtype, changes):
    """Through our checkpoint, which has our order of rows."""
    model = torch_model(**changes).to(dtype)
    model.save_pretrained(tmp_path / "in")
    for source, target, to in (("in", "run", "handgrad"), ("run", "out", "hf")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", to]) == 0
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    read = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out")]
    assert {key for key in read[0] if read[0][key] != read[1].get(key)} <= {"_name_or_path"}


def test_q_k_and_v_are_rows_in_this_order(tmp_path):
    model = torch_model()
    model.save_pretrained(tmp_path)
    weights, theirs = open_source(tmp_path).weights, model.state_dict()
    for kind in ("weight", "bias"):
        heads = theirs[f"gpt_neox.layers.1.attention.query_key_value.{kind}"].unflatten(0, (3, 3, 24))  # H, 3, D
        want = torch.cat([heads[:, part].flatten(0, 1) for part in range(3)])
        assert np.array_equal(weights.tensor(f"h.1.attn.qkv.{kind}"), want.numpy())


def test_older_spellings_and_files(tmp_path):
    """Of Pythia's own folders: rotary_pct and rotary_emb_base, causal masks among the tensors, no prefix."""
    torch_model().save_pretrained(tmp_path)
    new = hf.read_fields(tmp_path, FORM)
    assert (new["rope_theta"], new["rotary_pct"]) == (1e4, 0.25)
    reconfigure(tmp_path, drop=["rope_parameters"], rotary_emb_base=10000, rotary_pct=0.25, rope_scaling=None)
    assert hf.read_fields(tmp_path, FORM) == new
    reconfigure(tmp_path, rotary_emb_base=500, rotary_pct=0.5)
    found, config = hf.read_fields(tmp_path, FORM), transformers.GPTNeoXConfig.from_pretrained(tmp_path)
    rope = config.rope_parameters
    assert (found["rope_theta"], found["rotary_pct"]) == (rope["rope_theta"], rope["partial_rotary_factor"])
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    want = open_source(tmp_path).weights.tensor("wte.weight")
    old = {name.removeprefix("gpt_neox."): x for name, x in load_file(path).items()}
    old |= {f"layers.0.attention.{name}": torch.ones(5) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    save_file(old, path)
    assert np.array_equal(open_source(tmp_path).weights.tensor("wte.weight"), want)


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    default, found = transformers.GPTNeoXConfig(), hf.read_fields(tmp_path, FORM)
    for ours, (key, _) in FORM.fields.items():
        assert found[ours] == getattr(default, key), ours
    rope = default.rope_parameters
    assert (found["rope_theta"], found["rotary_pct"]) == (rope["rope_theta"], rope["partial_rotary_factor"])


def test_every_key_of_a_config_is_read_or_changes_nothing():
    """A key that a later transformers adds shows here."""
    fields = {"rope_theta": 1.0, "rotary_pct": 1.0}
    read = {key for key, _ in FORM.fields.values()} | FORM.only(fields).keys() | NEUTRAL.keys()
    read |= FORM.encode(fields).keys()
    names_or_training = {"transformers_version", "architectures", "dtype", "initializer_range", "use_cache"}
    outputs = {"output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"}
    ends = {"bos_token_id", "eos_token_id", "pad_token_id"}
    unused = {"chunk_size_feed_forward", "classifier_dropout", "is_decoder"}  # by the code of the language model
    own = {key for key in vars(transformers.GPTNeoXConfig()) if not key.startswith("_")}
    assert own - read - names_or_training - outputs - ends - unused == set()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attention_bias": False}, "has attention_bias True, but got False."),
        ({"attention_dropout": 0.1}, "has attention_dropout 0.0 or 0, but got 0.1."),
        ({"hidden_act": "mish"}, "act is one of gelu, "),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has a rope_type default, but got linear."),
        ({"rope_parameters": [1]}, "has rope_parameters that are an object, but got [1]."),
        ({"rope_parameters": {"factor": 2.0}}, "a key that is unknown here, but got factor."),
        ({"rope_parameters": {"partial_rotary_factor": 0.21}}, "24 columns, which are rotated in pairs, but got 0.21"),
    ],
)
def test_configs_that_no_kernel_computes_are_refused(tmp_path, changes, part):
    torch_model().save_pretrained(tmp_path)
    reconfigure(tmp_path, **changes)
    with pytest.raises(HandgradError) as error:
        open_source(tmp_path)
    assert str(error.value).startswith("[hf] ") and part in str(error.value)


# sizes, the verbs, generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "hidden_size is a multiple of num_heads"),
        ({"rotary_pct": 0.25}, "rotary_pct is a part of a head's 12 columns, which are rotated in pairs"),
        ({"rotary_pct": 1.5}, "rotary_pct is a part of a head's 12 columns"),
        ({"rotary_pct": 0.1}, "rotary_pct is a part of a head's 12 columns"),
        ({"act": "tanh"}, "act is one of gelu, gelu_new, "),
    ],
)
def test_sizes_that_do_not_fit(fields, message):
    with pytest.raises(HandgradError, match=rf"\[model\] {message}"):
        replace(SMALL, **fields)


def test_run_json_keeps_all_fields():
    model = KINDS["tied, all columns rotate"]
    assert from_dict(json.loads(json.dumps(to_dict(model))), "generate", "run.json") == model
    assert preset("d2", "gpt_neox").rotary_dims == 16 and preset("pythia-70m").mlp_size == 2048


def test_train_generate_and_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    letters = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 6_000).tolist())
    Path("words.txt").write_text(letters)
    hg.data.prepare_text([Path("words.txt")], "text", hg.tokenizers.chars(letters))
    sizes = "--family gpt_neox --num-layers 2 --num-heads 4 --hidden-size 64 --mlp-size 48 --max-seq-len 16"
    short = "--micro-batch 2 --sample-tokens 4 --val-every 2 --threads 1 --dtype f32 --train text"
    assert main(["train", *sizes.split(), *short.split(), "--steps", "4", "--out", "run"]) == 0
    assert main(["eval", "run", "--threads", "1"]) == 0
    assert main(["convert", "run", "hf", "--to", "hf"]) == 0
    capsys.readouterr()
    texts = []
    for source in ("run", "hf"):
        assert main(["generate", source, "--prompt", "ab", "--max-tokens", "9", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    """64 of them, through the key/value cache, in float32; the prompt is longer than a prefill chunk."""
    case = parity.CASES[name]
    theirs = parity.WithLoss(replace(case, sizes=case.sizes | {"max_position_embeddings": 256})).inner.eval()
    theirs.save_pretrained(tmp_path / "hf")
    prompt = np.random.default_rng(1).integers(0, parity.VOCAB, 83).tolist()
    with torch.no_grad():
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 83:].tolist()
    run = tmp_path / "run"
    assert main(["convert", str(tmp_path / "hf"), str(run), "--to", "handgrad"]) == 0
    letters = "".join(map(chr, range(256, 256 + parity.VOCAB)))
    (run / TOKENIZER).write_text(json.dumps(hg.tokenizers.chars(letters).save(run)))
    engine, _ = load_run(run, threads=1)
    assert list(engine.generate(prompt, 64, Sampling(temperature=0.0))) == want
    assert declare(engine.model).num_params > sum(p.numel() for p in theirs.parameters())  # padded rows
