"""P14: Hugging Face folders in and out, judged by transformers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import tokenizers as tokenizers_library
from tokenizers import ByteLevelBPETokenizer

from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.infer import Sampling
from handgrad.infer.load import load_run, open_source
from handgrad.io import hf
from handgrad.io.format import NEUTRAL, Format
from handgrad.models import GPT2

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file
transformers = pytest.importorskip("transformers")
AutoModelForCausalLM, AutoTokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
GPT2Config, GPT2LMHeadModel = transformers.GPT2Config, transformers.GPT2LMHeadModel
GPT2ForSequenceClassification = transformers.GPT2ForSequenceClassification
GPT2TokenizerFast = transformers.GPT2TokenizerFast

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
        # sums of at most 4 C products in another order, a few of them after each other in each of L layers
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
    hf.write(tmp_path / "out", Format(**source.model.hugging_face), weights, ends=(5,))
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
        "--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 48 --micro-batch 4 "
        "--threads 1 --steps 60 --dtype f32 --lr 0.01 --warmup 10 --val-every 0"
    ).split()
    assert main(["train", "--train", f"{folder}/data", "--out", f"{folder}/run", *flags]) == 0
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
    """--init: a .bin, a Hugging Face folder, a run; sizes are the model's, and its first loss what it had learned."""
    data = [
        "--train",
        str(run.parent / "data"),
        *"--micro-batch 4 --threads 1 --steps 2 --dtype f32 --lr 1e-9 --sample-tokens 0".split(),
    ]
    for to in ("model.bin", "folder"):
        assert main(["convert", str(run), str(tmp_path / to)]) == 0
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    for i, source in enumerate((run, run / "step_000060", tmp_path / "model.bin", tmp_path / "folder")):
        out = tmp_path / f"out{i}"
        assert main(["train", *data, "--init", str(source), "--out", str(out)]) == 0
        theirs, ours = open_source(run), open_source(out)
        assert ours.model == theirs.model
        assert all(
            np.abs(ours.weights.tensor(name) - theirs.weights.tensor(name)).max() < 1e-7 for name in ours.weights.shapes
        )
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert abs(next(line["val_loss"] for line in lines if line.get("val_loss")) - last["val_loss"]) < 1e-5
    # resuming needs the start no more
    (tmp_path / "model.bin").unlink()
    assert main(["train", *data, "--resume", str(tmp_path / "out2"), "--steps", "3"]) == 0
    capsys.readouterr()
    for flags, part in (
        (
            ["--hidden-size", "48", "--init", str(run)],
            "--hidden-size is left to the model that --init names, but got 48.",
        ),
        (["--depth", "2", "--init", str(run)], "--depth is left to the model"),
        (["--init", "lmc"], "[model] a model is a run folder, "),
    ):
        assert main(["train", *data, *flags, "--out", str(tmp_path / "none")]) == 2
        assert part in capsys.readouterr().err and not (tmp_path / "none").exists()
    torch_model(50257, 20, 1, 2, 4).save_pretrained(tmp_path / "gpt2")
    assert main(["train", *data, "--init", str(tmp_path / "gpt2"), "--out", str(tmp_path / "none")]) == 2
    assert (
        "are made with its tokenizer gpt2, to which 0 is b'!', but got b'\\n' of the data's chars "
        in capsys.readouterr().err
    )


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


# as transformers reads them -------------------------------------------------------------------------------------------


def change_tensors(folder, do):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    do(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def other(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def head_that_differs(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": other((97, 36))}))


def head_that_is_equal(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))


def head_instead_of_the_table(folder):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))


def head_of_one_other_value(folder):
    head_that_is_equal(folder)
    change_tensors(folder, lambda t: t["lm_head.weight"][96, 35].add_(1))


def stale_index(folder):
    names = {name: "model-00001-of-00002.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def older_shards(folder):
    torch_model(*SHAPES[0], initializer_range=1.0).save_pretrained(folder / "older", max_shard_size="20KB")
    change_tensors(folder, lambda t: t["transformer.wte.weight"].mul_(2))
    for path in (folder / "older").iterdir():
        if path.name != "config.json":
            path.rename(folder / path.name)
    shutil.rmtree(folder / "older")


def other_spellings(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, alias in ALIASES.items():
        config[alias] = config.pop(key)
    path.write_text(json.dumps(config))


ALIASES = {value: key for key, value in GPT2Config.attribute_map.items()}


def both_spellings(folder):
    reconfigure(folder, num_attention_heads=3, hidden_size=36)


def mixed_types(folder):
    kinds = [torch.float16, torch.bfloat16, torch.float32]
    change_tensors(folder, lambda t: t.update({name: x.to(kinds[i % 3]) for i, (name, x) in enumerate(t.items())}))


def body_alone(folder):
    change_tensors(folder, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)])
    reconfigure(folder, architectures=["GPT2Model"])


def upcast(folder):
    reconfigure(folder, reorder_and_upcast_attn=True)


def neutral_keys(folder):
    reconfigure(
        folder, sliding_window=None, per_layer_config={}, is_causal=True, n_ctx=20, color="blue", dtype="bfloat16"
    )


@pytest.mark.parametrize(
    "how",
    [
        head_that_differs,
        head_that_is_equal,
        head_instead_of_the_table,
        head_of_one_other_value,
        stale_index,
        older_shards,
        other_spellings,
        both_spellings,
        mixed_types,
        body_alone,
        upcast,
        neutral_keys,
    ],
)
def test_odd_folders_give_transformers_logits_before_and_after_a_conversion(folder, tmp_path, how):
    how(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compare_logits(folder, theirs)
    assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    again = loaded(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a, b = theirs(ids).logits, again(ids).logits
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_every_key_of_gpt2s_config_is_read_or_changes_nothing():
    """A key that a later transformers adds shows here."""
    form = open_form()
    read = {theirs for theirs, _ in form.fields.values()} | {key for keys, _ in form.shared.values() for key in keys}
    read |= form.only({"hidden_size": 1}).keys() | NEUTRAL.keys()
    names_or_training = {"transformers_version", "architectures", "dtype", "initializer_range", "use_cache"}
    outputs = {"output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"}
    ends = {"bos_token_id", "eos_token_id", "pad_token_id"}
    own = {field.name for field in fields(GPT2Config)}
    heads = {name for name in own if name.startswith("summary_")}
    unused = {"chunk_size_feed_forward"}  # by the code of their GPT-2
    known = read | names_or_training | outputs | ends | heads | unused
    assert own - known == set()
    assert dict(form.aliases) == {alias: key for key, alias in ALIASES.items()}


def open_form():
    return Format(**GPT2.hugging_face)


def test_dropout_of_a_folder_is_kept_by_conversions(folder, tmp_path):
    reconfigure(folder, resid_pdrop=0.25, embd_pdrop=0.25, attn_pdrop=0.25)
    assert open_source(folder).model.dropout == 0.25
    assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    config = GPT2Config.from_pretrained(tmp_path / "out")
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25,) * 3
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_pdrop")}))
    assert open_source(folder).model.dropout == GPT2Config().resid_pdrop == 0.1
    reconfigure(folder, attn_pdrop=0.2)
    line = told(open_source, folder)
    assert (
        "has one value for resid_pdrop, embd_pdrop, attn_pdrop: a model here has one dropout, but got 0.1, 0.1, 0.2."
        in line
    )


def test_shards_that_do_not_fit_their_index_are_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    first, *_, last = sorted(set(good["weight_map"].values()))

    def refused(part, **changes):
        path.write_text(json.dumps({"weight_map": {**good["weight_map"], **changes}}))
        line = told(open_source, folder)
        assert part in line, line
        path.write_text(json.dumps(good))

    assert open_source(folder).model.vocab_size == 97
    name = next(name for name, file in good["weight_map"].items() if file == first)
    refused("where it is, but got another file, or none.", **{name: last})
    refused(
        "holds transformer.more, as model.safetensors.index.json says, but got no such tensor.",
        **{"transformer.more": last},
    )
    refused("exists: model.safetensors.index.json names it, but got no such file.", **{name: "gone.safetensors"})
    save_file(load_file(folder / first), folder / "copy.safetensors")
    refused("is in copy.safetensors, where it is, but got another file", more="copy.safetensors")
    (folder / first).rename(folder / "kept")
    assert f"{first} exists: model.safetensors.index.json names it, but got no such file." in told(open_source, folder)
    os.mkfifo(folder / first)  # opening it would wait for ever
    assert "but got no such file." in told(open_source, folder)
    (folder / first).unlink()
    (folder / first).mkdir()
    assert "but got no such file." in told(open_source, folder)


def test_weights_of_another_architecture_are_refused(tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=20, n_layer=2, n_head=3, n_embd=36, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    line = told(open_source, tmp_path)
    assert "holds the tensors of its config.json alone, but got also score.weight." in line
    assert line.endswith("hint: GPT2LMHeadModel is read here; this is ['GPT2ForSequenceClassification']")


def test_a_tensor_with_and_without_the_prefix_is_refused(folder):
    change_tensors(folder, lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"] + 1}))
    assert "holds one tensor wpe.weight, but got two, the second in model.safetensors." in told(open_source, folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a whole model, but got adapter_config.json of an adapter. hint: merge" in told(open_source, folder)


# which tokens there are, and which of them end a text -----------------------------------------------------------------


def small_bpe(*special):
    """A byte-level BPE of a few words, with these special tokens first."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat sat on the mat\n"] * 9, vocab_size=280, special_tokens=list(special))
    return tokenizer


def lay(folder, tokenizer=None, **files):
    """Writes tokenizer.json, and other .json files by name."""
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (0,)),  # a bare tokenizer.json: <|endoftext|>, the first of the known names
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 2}}, (3,)),
        ({"generation_config": {"eos_token_id": [2, 3, 2]}}, (2, 3)),
        ({"generation_config": {}, "config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "<stop>"}}, (2,)),
        ({"config": {"eos_token_id": 50256}, "tokenizer_config": {"eos_token": "<stop>"}}, (3,)),
        ({"config": {"eos_token_id": 50256}}, (0,)),
        ({"config": {"eos_token_id": [50256, 3]}}, (3,)),
        ({"config": {"eos_token_id": None}}, ()),
        ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<stop>"}}, (3,)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, (2,)),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, ()),
        ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, (0,)),
        ({"tokenizer_config": {"eos_token": None}}, ()),
        ({"special_tokens_map": {"eos_token": "<stop>"}}, (3,)),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, (2,)),
    ],
)
def test_the_end_of_a_text_comes_from_the_models_files(tmp_path, files, ends):
    lay(tmp_path, small_bpe("<|endoftext|>", "<pad>", "</s>", "<stop>"), **files)
    for found in (tokenizers.from_folder(tmp_path), tokenizers.from_file(tmp_path / "tokenizer.json")):
        assert found.ends == ends and found.eot == (ends[0] if ends else None)
    (tmp_path / "kept").mkdir()
    again = tokenizers.load(json.loads(json.dumps(found.save(tmp_path / "kept"))), tmp_path / "kept")
    assert again.ends == ends
    (tmp_path / "out").mkdir()
    tokenizers.to_folder(found, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == found.eot
    assert tokenizers.from_folder(tmp_path / "out").eot == found.eot


def test_descriptions_of_earlier_versions_keep_their_end(tmp_path):
    lay(tmp_path, small_bpe("<s>", "</s>"))
    assert tokenizers.load({"kind": "file", "path": "tokenizer.json"}, tmp_path).ends == (1,)
    assert tokenizers.from_file(tmp_path / "tokenizer.json").save(tmp_path) == {
        "kind": "file",
        "path": "tokenizer.json",
    }
    assert tokenizers.load({"kind": "chars", "characters": "ab"}).ends == ()


def test_vocab_and_merges_keep_their_own_end_and_get_no_other(tmp_path):
    tokenizer = small_bpe("<s>", "<pad>", "</s>", "<unk>")
    tokenizer.save_model(str(tmp_path))
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    lay(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"} | words)
    ours, theirs = tokenizers.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.eot) == (len(theirs), theirs.eos_token_id) == (tokenizer.get_vocab_size(), 2)
    assert ours.encode("the mat").tolist() == theirs("the mat")["input_ids"]


def test_added_tokens_are_tokens(tmp_path):
    tokenizer = small_bpe("<|endoftext|>")
    tokenizer.save_model(str(tmp_path))
    count = tokenizer.get_vocab_size()
    about = {"eos_token": "<end>", "added_tokens_decoder": {str(count + 1): {"content": "<end>", "special": True}}}
    lay(tmp_path, added_tokens={"<tab>": count}, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"} | about)
    ours = tokenizers.from_folder(tmp_path)
    assert (ours.vocab_size, ours.eot) == (count + 2, count + 1)
    assert ours.encode("the<tab>mat").tolist()[1:-1].count(count) == 1
    assert count + 1 not in ours.encode("the <end>")  # a special token that is spelled out is text
    assert ours.decode([count, count + 1]) == "<tab><end>"
    # ids with gaps stay where they are
    lay(tmp_path, added_tokens={"<tab>": count + 5})
    (tmp_path / "tokenizer_config.json").unlink()
    ours = tokenizers.from_folder(tmp_path)
    assert ours.vocab_size == count + 6 and not ours.drawable()[count : count + 5].any() and ours.drawable()[count + 5]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "must have the id" in told(tokenizers.from_folder, tmp_path)


def test_a_tokenizer_and_its_ends_go_through_all_conversions(tmp_path):
    tokenizer = small_bpe("<s>", "<pad>", "</s>", "<stop>")
    model = torch_model(tokenizer.get_vocab_size(), 20, 1, 2, 16)
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path / "in")
    lay(tmp_path / "in", tokenizer)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert open_source(tmp_path / "run").tokenizer().ends == (2, 3)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    again = loaded(tmp_path / "out")
    assert again.generation_config.eos_token_id == [2, 3]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert open_source(tmp_path / "out").tokenizer().ends == (2, 3)


def test_ends_of_a_model_without_a_tokenizer_go_through_conversions(tmp_path):
    model = torch_model(97, 20, 1, 2, 16)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert loaded(tmp_path / "out").generation_config.eos_token_id == 7


@pytest.mark.parametrize("end", [5, None])
def test_characters_keep_their_end(tmp_path, end):
    model = torch_model(97, 20, 1, 2, 16)
    model.save_pretrained(tmp_path / "in")
    tokenizers.to_folder(tokenizers.chars("".join(map(chr, range(256, 256 + 97)))), tmp_path / "in")
    reconfigure(tmp_path / "in", eos_token_id=end)
    (tmp_path / "in" / "generation_config.json").unlink()
    ends = () if end is None else (end,)
    at = tmp_path / "in"
    for name in ("a.bin", "run", "out"):
        assert main(["convert", str(at), str(tmp_path / name)]) == 0
        at = tmp_path / name
        found = open_source(at).tokenizer()
        assert found.name == "chars" and found.ends == ends
    assert loaded(at).generation_config.eos_token_id == end


# ids that stand for no token are never drawn --------------------------------------------------------------------------


def gaps(folder):
    """A tokenizer that uses every third id below 60."""
    vocab = {chr(256 + i): 3 * i for i in range(20)}
    library = tokenizers_library.Tokenizer(tokenizers_library.models.BPE(vocab, []))
    library.decoder = tokenizers_library.decoders.Fuse()
    library.save(str(folder / "tokenizer.json"))
    return set(vocab.values())


def fewer(folder):
    """A tokenizer of 64 characters."""
    tokenizers.to_folder(tokenizers.chars("".join(map(chr, range(256, 256 + 64)))), folder)
    return set(range(64))


@pytest.mark.parametrize("lay_tokenizer", [gaps, fewer])
def test_ids_without_a_token_are_never_drawn(tmp_path, lay_tokenizer):
    """The model wants nothing but an id without a token: greedily, by chance, and in transformers after an export."""
    model = torch_model(97, 20, 1, 2, 16, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "in")
    known = lay_tokenizer(tmp_path / "in")

    def loud(tensors):
        tensors["transformer.ln_f.weight"].zero_()
        tensors["transformer.ln_f.bias"].fill_(1)
        tensors["lm_head.weight"].zero_()
        tensors["lm_head.weight"][80 if lay_tokenizer is fewer else 1] = 9  # its logit is 144, the others' 0
        tensors["lm_head.weight"][3] = 0.5

    change_tensors(tmp_path / "in", loud)
    engine, tokenizer = load_run(tmp_path / "in")
    assert list(engine.generate([0], 5, Sampling(temperature=0))) == [3] * 5
    drawn = list(engine.generate([0], 300, Sampling(temperature=30)))
    assert set(drawn) <= known and len(set(drawn)) > 9 and len(tokenizer.decode(drawn)) == 300
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert list(load_run(tmp_path / "run")[0].generate([0], 5, Sampling(temperature=0))) == [3] * 5
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = loaded(tmp_path / "out")
    with torch.no_grad():
        assert theirs(torch.tensor([[0]])).logits[0, -1].argmax() not in known  # the logits are unchanged
    prompt = torch.tensor([[0]])
    greedy = theirs.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert greedy[0].tolist() == [0] + [3] * 5
    torch.manual_seed(0)
    out = theirs.generate(
        prompt, max_new_tokens=19, do_sample=True, temperature=30.0, num_return_sequences=9, pad_token_id=0
    )
    assert set(out.flatten().tolist()) <= known
    out = theirs.generate(prompt, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert set(out.flatten().tolist()) <= known


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
        ({"model_type": "mixtral"}, "or t5, but got 'mixtral'."),
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
        ({"layer_norm_epsilon": "1e-5"}, "has layer_norm_epsilon 1e-05, but got 1e-5."),
        (
            {"num_attention_heads": 2},
            "has one value for n_head and its other name num_attention_heads, but got 3 and 2.",
        ),
        (
            {"max_position_embeddings": 20.0},
            "n_positions and its other name max_position_embeddings, but got 20 and 20.0.",
        ),
        ({"hidden_size": None}, "n_embd and its other name hidden_size, but got 36 and None."),
        ({"num_hidden_layers": [2]}, "n_layer and its other name num_hidden_layers, but got 2 and [2]."),
        ({"n_head": 3.0}, "gives a model whose num_heads is a whole number, but got 3.0."),
        ({"n_layer": True}, "gives a model whose num_layers is a whole number, but got True."),
        ({"n_positions": 10**12}, "gives a model whose max_seq_len is at most 2,147,483,647, but got 1000000000000."),
        ({"n_embd": 3 * 10**8}, "in "),
        ({"vocab_size": 2**31 - 1}, "transformer.wte.weight in"),
        ({"tie_word_embeddings": 1}, "gives a model whose tie_embeddings is true or false, but got 1."),
        ({"scale_attn_weights": 1}, "has scale_attn_weights True, but got 1."),
        ({"scale_attn_weights": False}, "has scale_attn_weights True, but got False."),
        ({"reorder_and_upcast_attn": 0}, "has reorder_and_upcast_attn False or True, but got 0."),
        ({"add_cross_attention": True}, "has add_cross_attention False, but got True."),
        ({"n_inner": 144.0}, "has n_inner None or 144, but got 144.0."),
        ({"n_inner": ["\n" * 999]}, "has n_inner None or 144, but got ['\\n\\n"),
        ({"resid_pdrop": 0.0}, "has one value for resid_pdrop, embd_pdrop, attn_pdrop: "),
        ({"resid_pdrop": "0.1", "embd_pdrop": "0.1", "attn_pdrop": "0.1"}, "whose dropout is a number, but got '0.1'."),
        ({"resid_pdrop": True, "embd_pdrop": True, "attn_pdrop": True}, "whose dropout is a number, but got True."),
        ({"is_causal": False}, "has is_causal True, but got False."),
        ({"is_causal": None}, "has is_causal True, but got None."),
        ({"sliding_window": 4}, "has sliding_window None, but got 4."),
        ({"per_layer_config": {"0": {"n_head": 1}}}, "has per_layer_config None or {}, but got {'0': {'n_head': 1}}."),
        ({"quantization_config": {"load_in_8bit": True}}, "has quantization_config None, but got "),
        ({"transformers_weights": "x.safetensors"}, "has transformers_weights None or model.safetensors, but got x."),
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
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in told(open_source, folder)


def test_huge_configs_are_refused_before_memory_is_touched(folder):
    reconfigure(folder, n_embd=36 * 10**6, vocab_size=2**31 - 1, n_positions=2**31 - 1)  # 10^17 numbers
    assert "has shape (108000000,), but got (108,)." in within(folder)


SCRIPT = """
import sys, time
from handgrad.infer.load import open_source
from handgrad import tokenizers
from handgrad.core.errors import HandgradError
start = time.perf_counter()
try:
    source = open_source(sys.argv[1])
    source.tokenizer()
except HandgradError as error:
    print(error)
print(time.perf_counter() - start)
print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def within(folder):
    """The one line of error that a process gives within 2 s and 500 MB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    line, seconds, mib = done.stdout.splitlines()
    assert float(seconds) < 2 and float(mib) < 500, done.stdout
    return line


def one_merge(vocab):
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("tokenizer.json", one_merge({"a": 0, "b": 2**31}), "must lie below 16,777,216, but got 2,147,483,648."),
        ("tokenizer.json", one_merge({"a": 0, "b": 2**24}), "must lie below 16,777,216, but got 16,777,216."),
        ("tokenizer.json", one_merge({"a": 0, "b": 2**64}), "must describe a tokenizer"),
        ("tokenizer.json", one_merge({"a": 0, "b": -1}), "must describe a tokenizer"),
        ("tokenizer.json", one_merge({"a": 0, "b": 0}), "must give every token an id of its own"),
        ("tokenizer.json", "[" * 10**5, "must describe a tokenizer"),
        ("tokenizer.json", "{" + '"":1,' * (2**19 + 1), "must hold at most 524,288 keys, but got 524,289."),
        ("tokenizer.json", "[" + "1," * (2**21 + 1), "must hold at most 2,097,152 items, but got 2,097,153."),
        ("tokenizer.json", " " * (48 * 2**20 + 1), "must have at most 50,331,648 bytes"),
        (
            "vocab.json",
            json.dumps({"a": 0, "b": 2**31}),
            "vocab.json gives ids in 0..16777215, but got 2147483648 for b.",
        ),
        ("vocab.json", json.dumps({"a": 0, "b": -1}), "but got -1 for b."),
        ("vocab.json", json.dumps({"a": 0, "b\n": 1.0}), "but got 1.0 for 'b\\n'."),
        ("vocab.json", json.dumps({"a": 0, "b": True}), "but got True for b."),
        ("vocab.json", json.dumps({"a": 0, "b": [1]}), "but got [1] for b."),
        ("vocab.json", json.dumps({"a": 0, "b": 0}), "must give every token an id of its own"),
        ("vocab.json", '{"\\ud800": 0}', "must describe a tokenizer"),
        ("vocab.json", "[" * 10**5, "vocab.json must be JSON"),
        ("vocab.json", "[]", "vocab.json must hold a JSON object, but got list."),
        (
            "tokenizer_config.json",
            '{"eos_token": 5}',
            "gives eos_token as text, or as an object with a content, but got 5.",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": "x"}}', "as ids and tokens, but got -1 and x."),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "as an object, but got [1]."),
        ("added_tokens.json", '{"x": 99999999999}', "but got "),
        ("special_tokens_map.json", "{", "special_tokens_map.json must be JSON"),
        ("generation_config.json", '{"eos_token_id": [[1]]}', "as an id, a list of ids, or null, but got [[1]]."),
        ("generation_config.json", '{"eos_token_id": true}', "as an id, a list of ids, or null, but got True."),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["x"]}}', "but got no such weight_map."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "\\ud800"}}', "but got no such weight_map."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x\\u0000"}}', "but got no such weight_map."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x\\ny"}}', "but got no such weight_map."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/dev/zero"}}', "but got no such weight_map."),
        ("model.safetensors.index.json", "[" * 10**5, "must be JSON"),
        (
            "model.safetensors.index.json",
            " " * (6 * 2**20 + 1),
            "must have at most 6,291,456 bytes, but got 6,291,457.",
        ),
        ("config.json", '{"model_type": ' + "[" * 10**5, "must be JSON"),
        ("config.json", '{"model_type": "\\ud800\\n"}', "or t5, but got '\\ud800\\n'."),
        ("config.json", '{"model_type": "gpt2", "n_layer": 1' + "0" * 5000 + "}", "must be JSON"),
    ],
)
def test_hostile_files_are_one_line_soon(folder, name, text, part):
    if name.startswith("model.safetensors"):
        (folder / "model.safetensors").unlink()
    elif name != "tokenizer.json":
        (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / name).write_text(text)
    assert part in within(folder)


def test_hostile_safetensors_are_one_line_soon(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = 90 * 2**20
    with path.open("wb") as file:  # a header of 90 MB, which the format allows
        file.write(size.to_bytes(8, "little") + b"{" + b" " * (size - 2) + b"}" + raw)
    assert "has at most 8,388,608 bytes, but got 94,371,840." in within(folder)
    path.write_bytes(raw)
    change_tensors(folder, lambda t: t.update({"new\nline": torch.zeros(1)}))
    assert "but got also 'new\\nline'." in within(folder)
    path.unlink()
    os.mkfifo(path)
    assert "holds model.safetensors or model.safetensors.index.json, but got neither." in within(folder)


# the hub --------------------------------------------------------------------------------------------------------------


def test_p14_hf_names_need_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = told(open_source, "hf:openai-community/gpt2")
    assert (
        line == "[hf] hf:openai-community/gpt2 needs the package huggingface_hub, but got none. hint: "
        f"{install_command('hub')}, or give a local folder"
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
