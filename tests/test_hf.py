"""P14: Hugging Face folders in and out, judged by transformers."""

import json
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.install import install
from handgrad.infer.load import load_run, open_source
from handgrad.io import hf

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file
transformers = pytest.importorskip("transformers")
AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast = (
    transformers.AutoModelForCausalLM,
    transformers.AutoTokenizer,
    transformers.GPT2Config,
    transformers.GPT2LMHeadModel,
    transformers.GPT2TokenizerFast,
)

SHAPES = [  # vocabulary, longest sequence, layers, heads, width
    (97, 20, 2, 3, 36),
    (128, 7, 1, 1, 8),
    (129, 33, 3, 2, 10),
    (1, 1, 1, 1, 1),
]


def torch_model(V, T, L, H, C, **changes):
    torch.manual_seed(V)
    config = GPT2Config(
        vocab_size=V, n_positions=T, n_layer=L, n_head=H, n_embd=C, bos_token_id=None, eos_token_id=None, **changes
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return model


def loaded(folder, **how):
    """transformers' model of a folder, which must lack no tensor and have none too many."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert isinstance(model, GPT2LMHeadModel)
    return model.eval()


def told(what, *args):
    with pytest.raises(HandgradError) as error:
        what(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    """Whether two models have the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["", "llmc", "handgrad", "llmc handgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p14_round_trip_is_bit_exact(tmp_path, shape, dtype, way):
    """Through llm.c's .bin, a run folder, or both, and out again with the same bits."""
    model = torch_model(*shape).to(dtype)
    model.save_pretrained(tmp_path / "in")
    at = tmp_path / "in"
    for kind in way.split():
        new = tmp_path / (f"{kind}.bin" if kind == "llmc" else kind)
        assert main(["convert", str(at), str(new), "--to", kind]) == 0
        at = new
    assert main(["convert", str(at), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert same(loaded(tmp_path / "out", dtype="auto"), model)


def test_p14_untied_heads(tmp_path):
    model = torch_model(*SHAPES[0], tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    model.save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert same(loaded(tmp_path / "out"), model)
    compare_logits(tmp_path / "out", model)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p14_logits_of_a_folder_equal_transformers(tmp_path, shape):
    model = torch_model(*shape)
    model.save_pretrained(tmp_path)
    compare_logits(tmp_path, model)


def compare_logits(folder, model):
    V, T, L, C = (getattr(model.config, name) for name in ("vocab_size", "n_positions", "n_layer", "n_embd"))
    tokenizers.to_folder(tokenizers.chars("".join(map(chr, range(256, 256 + V)))), folder)
    engine, _ = load_run(folder)
    for length in {1, T // 2 or 1, T}:
        ids = np.random.default_rng(length).integers(0, V, length)
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
        engine.position = 0
        # sums of at most 4 C products in another order, a few of them behind each other in each of L layers
        tolerance = 2.0**-24 * 8 * (4 * C) ** 0.5 * L * np.abs(theirs).max()
        assert np.abs(engine.logits(ids) - theirs).max() <= tolerance


def test_p14_shards_float16_old_names_and_masks(tmp_path):
    model = torch_model(*SHAPES[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.half().save_pretrained(tmp_path / "half")
    old = {
        name.removeprefix("transformer."): t
        for name, t in model.float().state_dict().items()
        if name != "lm_head.weight"
    }
    old |= {"h.0.attn.bias": torch.ones(1, 1, 20, 20), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    (tmp_path / "old").mkdir()
    save_file({name: t.contiguous() for name, t in old.items()}, tmp_path / "old" / "model.safetensors")
    shutil.copy(tmp_path / "half" / "config.json", tmp_path / "old")
    first = open_source(tmp_path / "shards").weights
    for name in ("half", "old"):
        weights = open_source(tmp_path / name).weights
        assert weights.dtype == "f32" and all(
            (weights.tensor(name, "f32") == first.tensor(name).astype(np.float16).astype(np.float32)).all()
            for name in weights.shapes
        )


def test_p14_bf16_is_the_nearest(tmp_path):
    model = torch_model(*SHAPES[0])
    model.save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "hf", "--dtype", "bf16"]) == 0
    assert same(loaded(tmp_path / "out", dtype="auto"), model.bfloat16())


def test_p14_safetensors_reads_what_we_write(tmp_path):
    """Aligned data, no holes: safetensors' own reader checks both."""
    torch_model(*SHAPES[2]).save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    source = open_source(tmp_path / "in")
    weights = replace(source.weights, fields=asdict(source.model) | {"dropout": 0.25})
    hf.write(tmp_path / "out", hf.Format(**source.model.hugging_face), weights, eot=5)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], t) for name, t in theirs.items())
    config = GPT2Config.from_pretrained(tmp_path / "out")
    assert (config.attn_pdrop, config.eos_token_id, config.vocab_size, config.n_positions) == (0.25, 5, 129, 33)


# a model trained here -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a text that repeats itself."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "text.txt").write_text("the quick brown fox jumps over a lazy dog.\n" * 200)
    assert main(f"data text {folder}/text.txt --out {folder}/data --tokenizer chars".split()) == 0
    flags = (
        "--model.num-layers 2 --model.num-heads 2 --model.hidden-size 32 --model.max-seq-len 48 --run.micro-batch 4 "
        "--run.threads 1 --run.steps 60 --run.dtype f32 --optim.lr 0.01 --optim.warmup 10 --run.val-every 0"
    ).split()
    assert main(["train", "--data.train", f"{folder}/data", "--run.out", f"{folder}/run", *flags]) == 0
    return folder / "run"


@pytest.mark.parametrize("way", ["hf", "llmc hf"])
def test_p14_transformers_generates_the_same_text(run, tmp_path, capsys, way):
    """transformers loads it, cuts the prompt with its tokenizer, and goes on greedily with the same text."""
    at = run
    for kind in way.split():
        new = tmp_path / ("model.bin" if kind == "llmc" else kind)
        assert main(["convert", str(at), str(new), "--to", kind]) == 0
        at = new
    capsys.readouterr()
    flags = ["--prompt", "the quick b", "--temperature", "0", "--max-tokens", "30", "--threads", "1"]
    texts = []
    for source in (run, at):
        assert main(["generate", str(source), *flags]) == 0
        texts.append(capsys.readouterr().out[:-1])
    model, tokenizer = loaded(at), AutoTokenizer.from_pretrained(at)
    prompt = tokenizer("the quick b", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert texts == [tokenizer.decode(out[0])] * 2 and len(texts[0]) == 41


def test_p14_training_starts_from_any_model(run, tmp_path, capsys):
    """--model.init: a .bin, a Hugging Face folder, a run; sizes are the model's, and its first loss what it had learned."""
    data = [
        "--data.train",
        str(run.parent / "data"),
        *"--run.micro-batch 4 --run.threads 1 --run.steps 2 --run.dtype f32 --optim.lr 1e-9 --run.sample-tokens 0".split(),
    ]
    for to in ("model.bin", "folder"):
        assert main(["convert", str(run), str(tmp_path / to)]) == 0
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    for i, source in enumerate((run, run / "step_000060", tmp_path / "model.bin", tmp_path / "folder")):
        out = tmp_path / f"out{i}"
        assert main(["train", *data, "--model.init", str(source), "--run.out", str(out)]) == 0
        theirs, ours = open_source(run), open_source(out)
        assert ours.model == theirs.model
        assert all(
            np.abs(ours.weights.tensor(name) - theirs.weights.tensor(name)).max() < 1e-7 for name in ours.weights.shapes
        )
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert abs(next(line["val_loss"] for line in lines if line.get("val_loss")) - last["val_loss"]) < 1e-5
    # resuming needs the start no more
    (tmp_path / "model.bin").unlink()
    assert main(["train", *data, "--run.resume", str(tmp_path / "out2"), "--run.steps", "3"]) == 0
    capsys.readouterr()
    for flags, part in (
        (
            ["--model.hidden-size", "48", "--model.init", str(run)],
            "--model.hidden-size is left to the model that --model.init names, but got 48.",
        ),
        (["--model.depth", "2", "--model.init", str(run)], "--model.depth is left to the model"),
        (["--model.init", "lmc"], "[model] a model is a run folder, "),
    ):
        assert main(["train", *data, *flags, "--run.out", str(tmp_path / "none")]) == 2
        assert part in capsys.readouterr().err and not (tmp_path / "none").exists()
    torch_model(50257, 20, 1, 2, 4).save_pretrained(tmp_path / "gpt2")
    assert main(["train", *data, "--model.init", str(tmp_path / "gpt2"), "--run.out", str(tmp_path / "none")]) == 2
    assert "are made with its tokenizer gpt2, to which 0 is b'!', but got b'\\n' of chars." in capsys.readouterr().err


# tokenizers -----------------------------------------------------------------------------------------------------------

TEXT = "Hello  world, it's <é日> 12\n\n x"


def test_p14_gpt2s_tokenizer_as_transformers_loads_it(tmp_path):
    ours = tokenizers.gpt2()
    tokenizers.to_folder(ours, tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), GPT2TokenizerFast.from_pretrained(tmp_path)):
        assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT).tolist() and tokenizer.eos_token_id == 50256
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert tokenizers.from_folder(tmp_path / "theirs") is ours
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = about["model"]["vocab"]
    vocab["hello"], vocab["world"] = vocab["world"], vocab["hello"]  # as many tokens, and others
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(about))
    other = tokenizers.from_folder(tmp_path / "theirs")
    assert other is not ours and other.encode("hello").tolist() == ours.encode("world").tolist()
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizers.from_folder(tmp_path) is ours  # from vocab.json and merges.txt


def test_p14_characters_and_other_tokenizers(tmp_path):
    ours = tokenizers.chars(TEXT)
    tokenizers.to_folder(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).tolist() and theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert tokenizers.from_folder(tmp_path).characters == ours.characters
    # another byte-level BPE is not taken for GPT-2's
    vocab = {c: i for i, c in enumerate(["h", "e", "l", "o", "he", "<|endoftext|>"])}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    found = tokenizers.from_folder(tmp_path)
    assert found.encode("hello").tolist() == [4, 2, 2, 3] and found.eot == 5
    tokenizers.to_folder(found, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"] == [4, 2, 2, 3]
    assert tokenizers.from_folder(tmp_path / "none") is None


# what is wrong --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch_model(*SHAPES[0]).save_pretrained(tmp_path)
    return tmp_path


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "llama"}, "has the model_type gpt2, but got 'llama'."),
        ({"n_layer": 0}, "gives a model whose num_layers is at least 1, but got 0."),
        ({"n_layer": 10**9}, "gives a model whose num_layers is at most 1,024, but got 1000000000."),
        ({"n_layer": 1024}, "holds the tensor transformer.h.10.attn.c_attn.bias, but got no such."),
        ({"n_head": "3"}, "gives a model whose num_heads is a whole number, but got '3'."),
        ({"n_head": 5}, "gives a model whose hidden_size is a multiple of num_heads, but got 36 and 5 heads."),
        ({"n_embd": None}, "gives a model whose hidden_size is a whole number, but got None."),
        ({"n_layer": 1}, "holds the tensors of its config.json alone, but got also transformer.h.1."),
        ({"vocab_size": 98}, "transformer.wte.weight in"),
        ({"tie_word_embeddings": None}, "gives a model whose tie_embeddings is true or false, but got None."),
        ({"tie_word_embeddings": False}, "holds the tensor lm_head.weight, but got no such."),
        ({"n_inner": 100}, "has n_inner None or 144, but got 100. hint: no kernel here computes another"),
        ({"activation_function": "relu"}, "has activation_function gelu_new or gelu_pytorch_tanh, but got relu."),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx False, but got True."),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon 1e-05, but got 1e-06."),
    ],
)
def test_p14_invalid_configs_are_refused(folder, changes, part):
    reconfigure(folder, **changes)
    line = told(open_source, folder)
    assert line.startswith("[hf] ") and part in line


@pytest.mark.parametrize("how", ["empty", "truncated", "noise", "f64", "missing", "pickle"])
def test_p14_damaged_weights_are_refused(folder, how):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if how == "f64":
        save_file({name: t.double() for name, t in load_file(path).items()}, path)
    elif how in ("missing", "pickle"):
        path.rename(folder / "pytorch_model.bin" if how == "pickle" else folder / "x")
    else:
        path.write_bytes({"empty": b"", "truncated": data[:-1], "noise": data[:40] + data[48:]}[how])
    part = {
        "f64": "are F32, BF16, F16, but got F64.",
        "missing": "holds model.safetensors or model.safetensors.index.json, but got neither.",
        "pickle": "hint: transformers' save_pretrained writes it from pytorch_model.bin",
    }
    assert part.get(how, "is a whole safetensors file, but got ") in told(open_source, folder)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'],
)
def test_p14_damaged_indices_are_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in told(open_source, folder)


# the hub --------------------------------------------------------------------------------------------------------------


def test_p14_hf_names_need_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = told(open_source, "hf:openai-community/gpt2")
    assert (
        line == "[hf] hf:openai-community/gpt2 needs the package huggingface_hub, but got none. hint: "
        f"{install('hub')}, or give a local folder"
    )


def test_p14_hf_names_are_found_in_the_hubs_cache(monkeypatch, tmp_path, capsys):
    """A cache in the hub's own layout, no network: what is in it is used, what is not is one line."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    place = tmp_path / "models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    torch_model(*SHAPES[0]).save_pretrained(place / "snapshots" / commit)
    assert open_source("hf:someone/small").model.vocab_size == 97
    assert main(["convert", "hf:someone/small", str(tmp_path / "small.bin")]) == 0
    assert open_source(tmp_path / "small.bin").model.hidden_size == 36
    assert told(open_source, "hf:someone/other").startswith("[hf] hf:someone/other can be downloaded, but got ")
