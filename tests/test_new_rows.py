"""Rows for added tokens: a model to start from gets the mean of its rows for them, in the table and in a head of its own."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from handgrad import data, tokenizers
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.infer.load import check_same_tokens, load, open_source
from handgrad.io import checkpoint
from handgrad.models import GPT2, T5, Llama, declare, to_dict
from handgrad.train.growth import with_new_rows

TEXT = data.shakespeare().read_text(encoding="utf-8")[:3000]
BASE = tokenizers.train([TEXT], 300)
SPECIAL = ("<|im_start|>", "<|im_end|>")
TINY = dict(num_layers=1, num_heads=2, hidden_size=16)


def saved(folder, model, tokenizer=BASE, dtype="f32"):
    """A checkpoint of random weights, with rows of padding that are no zeros, in a run folder with this tokenizer."""
    import ml_dtypes

    rng, kind = np.random.default_rng(0), {"f32": np.float32, "bf16": ml_dtypes.bfloat16}[dtype]
    params = {n: rng.normal(0, 0.1, i.tensor.shape).astype(kind) for n, i in declare(model).params.items()}
    meta = {**to_dict(model), "dtype": dtype, "stored": np.dtype(kind).name, "config": {}, "tokens": 0, "outliers": {}}
    checkpoint.save(folder, 0, params, {}, meta | {"skips": 0, "versions": {}, "ends": [299]})
    (folder / "tokenizer-spec.json").write_text(json.dumps(tokenizer.save(folder)))
    return params


MODELS = [
    (GPT2(vocab_size=300, max_seq_len=16, **TINY), ("wte.weight",)),  # 300 and 302 ids are 384 rows
    (
        Llama(vocab_size=300, max_seq_len=16, num_kv_heads=1, mlp_size=24, tie_embeddings=False, **TINY),
        ("embed", "head"),
    ),
    (GPT2(vocab_size=310, max_seq_len=16, **TINY), ("wte.weight",)),  # rows of padding that count, as Qwen has them
]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("model", "tables"), MODELS, ids=["tied", "untied", "padded"])
def test_new_rows_are_the_mean_of_the_others(tmp_path, model, tables, dtype):
    params = saved(tmp_path, model, dtype=dtype)
    source, more = open_source(tmp_path), tokenizers.extend(BASE, SPECIAL)
    added = check_same_tokens(source, more)
    assert added == range(300, 302)
    grown, weights = with_new_rows(source, added)
    size = max(model.vocab_size, 302)
    assert grown == replace(model, vocab_size=size) and asdict(grown) == weights.fields and weights.dtype == dtype
    changed = [name for name, shape in weights.shapes.items() if len(params[name]) > 300 and shape[0] == size]
    assert len(changed) == len(tables)
    for name, values in params.items():
        found = weights.tensor(name, rows=declare(grown).params[name].tensor.shape[0])
        if name not in changed:
            assert np.array_equal(found, values), name
            continue
        mean = values[:300].astype(np.float64).sum(axis=0) / 300
        half = 2.0 ** (-24 if dtype == "f32" else -8)  # of a unit in the last of 24 or 8 places: rounded once
        np.testing.assert_allclose(found[300:302].astype(np.float64), [mean] * 2, rtol=half, atol=1e-16)
        assert np.array_equal(found[:300], values[:300]) and np.array_equal(found[302:size], values[302:size])
        assert not found[size:].any()


def prepared(folder, tokenizer):
    (folder / "text.txt").write_text(TEXT + "<|im_end|>")
    data.prepare("text", folder / "d", tokenizer, files=folder / "text.txt", special_tokens=True)
    return str(folder / "d")


def train(folder, init, shards, out, **flags):
    words = f"train --init {init} --train {shards} --out {folder / out} --steps 2 --seq-len 16 --micro-batch 2"
    more = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return main([*words.split(), *"--sample-tokens 0 --backend cpu --threads 1 --dtype f32".split(), *more])


def test_a_run_learns_new_tokens_and_is_exported(tmp_path, capsys):
    pytest.importorskip("gguf")
    saved(tmp_path / "m", MODELS[1][0])
    shards = prepared(tmp_path, tokenizers.extend(BASE, SPECIAL))
    assert train(tmp_path, tmp_path / "m", shards, "r", lr=0) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "new rows 2, each the mean of the 300 others, for the added tokens '<|im_start|>', '<|im_end|>'" in shown
    before, after = open_source(tmp_path / "m").weights, open_source(tmp_path / "r").weights
    assert after.fields["vocab_size"] == 302
    for name, shape in after.shapes.items():  # a rate of 0 trains nothing: what the run began with
        values = before.tensor(name)
        if shape[0] == 302:
            values = np.concatenate([values, np.repeat(values.mean(0, keepdims=True, dtype=np.float64), 2, 0)])
        np.testing.assert_allclose(after.tensor(name), values, rtol=2**-23, atol=1e-9)
    assert main(["train", "--resume", str(tmp_path / "r"), "--steps", "3"]) == 0  # nothing grows twice
    assert "new rows" not in capsys.readouterr().out
    prompt, texts = "to be<|im_end|>", []
    for place in ("hf", "m.gguf"):
        assert main(["convert", str(tmp_path / "r"), str(tmp_path / place), "--dtype", "f32"]) == 0
    for place in ("r", "hf", "m.gguf"):
        loaded = load(tmp_path / place, backend="cpu", threads=1)
        assert loaded.model.vocab_size == loaded.tokenizer.vocab_size == 302
        texts.append(loaded.generate(prompt, max_tokens=8, temperature=0, special_tokens=True))
    assert len(set(texts)) == 1
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    shapes = [tuple(layer.weight.shape) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert shapes == [(302, 16)] * 2


def test_tokenizers_that_differ_otherwise_are_refused(tmp_path):
    saved(tmp_path / "m", MODELS[0][0])
    source = open_source(tmp_path / "m")
    larger = tokenizers.train([TEXT], 340)  # 40 merges more, whose ids are those of the end of text, and others
    with pytest.raises(
        HandgradError, match=r"made with its tokenizer tokenizer.json, to which 299 is b'<\|endoftext\|>'"
    ):
        check_same_tokens(source, larger)
    chars = tokenizers.chars("abc")
    saved(tmp_path / "c", GPT2(vocab_size=3, max_seq_len=16, **TINY), chars)
    with pytest.raises(
        HandgradError, match="with its tokenizer of 3 tokens, or one that adds some, but got 4 of chars"
    ):
        check_same_tokens(open_source(tmp_path / "c"), tokenizers.chars("abcd"))
    assert check_same_tokens(open_source(tmp_path / "c"), tokenizers.chars("ab")) == range(0)
    (tmp_path / "m" / "tokenizer-spec.json").unlink()
    assert not check_same_tokens(open_source(tmp_path / "m"), tokenizers.extend(BASE, SPECIAL))  # as before: no record


def test_a_family_with_special_tokens_of_its_own_is_refused(tmp_path):
    model = T5(vocab_size=300 + len(T5.special_tokens), max_seq_len=16, **TINY)
    saved(tmp_path / "m", model)
    source = open_source(tmp_path / "m")
    with pytest.raises(HandgradError, match="a t5 gets no new rows: its special tokens are the last of its vocabulary"):
        with_new_rows(source, check_same_tokens(source, tokenizers.extend(BASE, SPECIAL)))
    assert Path(tmp_path / "m").exists()


def test_data_of_another_tokenizer_are_refused_with_the_command(tmp_path, monkeypatch, capsys):
    """Each command that is suggested makes data that the model takes."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "my model", MODELS[0][0])
    Path("a.txt").write_text(TEXT)
    Path("a.jsonl").write_text(
        "".join(
            json.dumps({"text": line, "prompt": line, "completion": line}) + "\n"
            for line in TEXT.split("\n")
            if line.strip()
        )
    )
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content + '<|endoftext|>' }}{% endfor %}")
    other = tokenizers.train([TEXT[::-1]], 280)
    Path("other").mkdir()
    tokenizers.to_folder(other, "other")
    flags = "--steps 1 --micro-batch 1 --seq-len 16 --backend cpu --threads 1 --sample-tokens 0".split()
    more = {"text": [], "jsonl": ["--val-tokens", "99"], "chat": ["--template", "t.jinja"]}
    for recipe, source in (("text", "a.txt"), ("jsonl", "a.jsonl"), ("chat", "a.jsonl")):
        made = [
            *(["--model"] if recipe == "chat" else ["--tokenizer"]),
            "other",
            "--out",
            f"of {recipe}",
            *more[recipe],
        ]
        assert main(["data", recipe, source, *made]) == 0
        capsys.readouterr()
        train = ["train", "--init", "my model", "--train", f"of {recipe}", "--out", f"run {recipe}", *flags]
        assert main(train) == 2
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "of the data's tokenizer.json of 280 tokens, not the model's of 300. hint: " in said
        )
        words = shlex.split(said.split("hint: handgrad ")[1])
        words[words.index("FILE...")] = source
        assert main([*words, *more[recipe]]) == 0 and main(train) == 0
    assert main(["train", "--init", "my model", "--out", "plays run", *flags]) == 2  # characters
    command, then = capsys.readouterr().err.split("hint: handgrad ")[1].split(", then ")
    assert main(shlex.split(command)) == 0 and then == "--train plays\n"
    assert main(["train", "--init", "my model", "--out", "plays run", *then.split(), *flags]) == 0
    saved(tmp_path / "of gpt2", replace(MODELS[0][0], vocab_size=50257), tokenizers.gpt2())
    assert main(["train", "--init", "of gpt2", "--train", "of text", "--out", "g", *flags]) == 2
    assert (
        "hint: handgrad data text FILE... --tokenizer 'of gpt2' --out 'of text' --replace\n" in capsys.readouterr().err
    )
