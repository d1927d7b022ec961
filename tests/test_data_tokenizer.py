"""Which data a name stands for, and which tokenizer made them: folders, globs over folders, and evaluation files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library

from handgrad import data, evals, tokenizers
from handgrad.core.errors import HandgradError
from handgrad.train import datasets, resolve
from handgrad.train.config import from_names
from handgrad.train.journal import tokenizer_of
from handgrad.train.run import train
from handgrad.train.trainer import Trainer

TEXT = "0123456789 abc\n" * 400  # 15 characters
TINY = dict(num_layers=1, num_heads=1, hidden_size=16)
SHORT = dict(micro_batch=2, steps=1, threads=1, sample_tokens=0, backend="cpu", dtype="f32")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with my.txt, and a tokenizer.json of 269 tokens in t.json."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(TEXT)
    made = library.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=269, special_tokens=["<|endoftext|>"])
    made.save("t.json")
    return tmp_path


def chars(folder, text=TEXT):
    data.prepare_text("my.txt", folder, tokenizers.chars(text + TEXT))


def of_file(folder):
    data.prepare_text("my.txt", folder, tokenizers.from_file("t.json"))


def config(train_on="shakespeare", **changes):
    return from_names(TINY | SHORT | dict(train=train_on, seq_len=16) | changes)


def trained(c, out="run"):
    """The settings that the run folder records, and its tokenizer."""
    assert train(replace(c, run=replace(c.run, out=str(out)))) == 0
    saved = json.loads(Path(out, "config.json").read_text())
    spec = json.loads(Path(out, "tokenizer-spec.json").read_text())
    return saved, tokenizers.load(spec, out)


# names ----------------------------------------------------------------------------------------------------------------


def test_a_folder_goes_before_the_packaged_text(here, capsys):
    chars("shakespeare")
    saved, tokenizer = trained(config())
    assert tokenizer.characters == "\n 0123456789abc" and saved["model"]["vocab_size"] == 15
    assert saved["data"]["train"] == "./shakespeare"
    assert "trains on the folder shakespeare here, not on the text in the package" in capsys.readouterr().out
    assert not Path("run", "data").exists()


def test_without_a_folder_the_word_is_the_packaged_text(here, capsys):
    saved, tokenizer = trained(config())
    assert tokenizer.vocab_size == 64 and saved["data"]["train"] == "shakespeare"
    assert "trains on the folder" not in capsys.readouterr().out
    Path("shakespeare").write_text("a file is no folder")
    assert datasets.local_folder_first(config(), Path("run2")).data.train == "shakespeare"


def test_a_resumed_run_keeps_its_data(here):
    """A folder that appears later does not replace the packaged text, nor the packaged text a folder that is gone."""
    trained(config())
    chars("shakespeare")
    again = config(out="run", resume="run", steps=2)
    assert datasets.local_folder_first(again, Path("run")).data.train == "shakespeare"
    assert resolve.resolve(again, Path("run")).tokenizer.vocab_size == 64
    saved, _ = trained(config(), "own")
    shutil.rmtree("shakespeare")
    with pytest.raises(HandgradError, match="at least one token shard must match ./shakespeare"):
        resolve.resolve(config(saved["data"]["train"]), Path("own"))


@pytest.mark.parametrize("name", ["set [1]", "a*b", "what?", "[", "plain"])
def test_folders_with_glob_characters(here, name):
    """As a folder, in a glob, as a file, with a tokenizer.json in them; also where a folder matches as a pattern."""
    of_file(name)
    if name == "set [1]":
        chars("set 1")
    for word in (name, f"{name}/train_*.bin", f"{name}/train_000000.bin", f"./{name}/"):
        assert tokenizer_of(data.find_shards(word)).vocab_size == 269, word
        assert data.tokens(word, 16, 32).folder == Path(word if word == name else os.path.normpath(f"{name}"))
    saved, tokenizer = trained(config(name))
    assert saved["model"]["vocab_size"] == tokenizer.vocab_size == 269


def test_tokens_of_a_folder(here):
    chars("p")
    train_set, val = data.tokens("p", 16, 32), data.tokens(Path("p"), 16, 32, split="val", shuffle=False)
    assert [shard.path.name for shard in train_set.shards] == ["train_000000.bin"]
    assert [shard.path.name for shard in val.shards] == ["val_000000.bin"]
    assert val.meta == data.read_meta("p") and val.folder == Path("p")
    own = tokenizers.load(val.meta["tokenizer"], val.folder)
    assert own.decode(val.batch(0)["ids"][0]) == TEXT[5400:5416]  # 90 % of the text is train
    assert repr(train_set) == "Tokens('p': 5,400 ids in 1 shard, 336 windows of 16, 2 in a step)"
    assert repr(train_set.shards[0]) == "Shard('p/train_000000.bin': 5,400 ids, uint16)"
    Path("empty").mkdir()
    with pytest.raises(HandgradError, match=r"must match empty/train_\*.bin, but got none"):
        data.tokens("empty", 16, 32)


@pytest.mark.parametrize(
    ("word", "got"),
    [
        ("nowhere/*.bin", "none"),
        ("my.txt/train_*.bin", "none: Not a directory"),
        ("x" * 300 + "/train_*.bin", "none: File name too long"),
        ("a\0b", "none"),
    ],
)
def test_why_no_shard_matches(here, word, got):
    with pytest.raises(HandgradError, match=f"but got {got}. hint: handgrad data makes them"):
        tokenizer_of(data.find_shards(word))


def test_training_saves_when_its_data_shrink(here, monkeypatch):
    """A copy in place that truncates a shard in step 3: the error names it, and the two steps done are on disk."""
    data.prepare_text("my.txt", "p", tokenizers.chars(TEXT))
    step = Trainer.step

    def shrinks(self, number, *rest):
        if number == 3:
            os.truncate("p/train_000000.bin", 1024)
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", shrinks)
    c = config("p")
    with pytest.raises(HandgradError) as error:
        train(replace(c, run=replace(c.run, steps=9, out="run")))
    assert str(error.value) == (
        "[data] p/train_000000.bin must not change during a run, but got 1,024 bytes, 11,824 before."
    )
    assert [path.name for path in Path("run").glob("step_*")] == ["step_000002"]


# several folders ------------------------------------------------------------------------------------------------------


def test_folders_of_one_tokenizer_are_one_set(here):
    for make, names, size in ((chars, ("p1", "p2"), 15), (of_file, ("q1", "q2"), 269)):
        for name in names:
            make(name)
        saved, tokenizer = trained(config(f"{names[0][0]}?/train_*.bin"), f"run-{names[0]}")
        assert saved["model"]["vocab_size"] == tokenizer.vocab_size == size


@pytest.mark.parametrize("kind", ["chars", "file", "changed file", "none"])
def test_folders_of_different_tokenizers_are_refused(here, kind):
    chars("p1") if kind in ("chars", "none") else of_file("p1")
    if kind == "chars":
        chars("p2", "xyz")
    elif kind == "file":
        chars("p2")
    elif kind == "changed file":  # the same words in meta.json
        of_file("p2")
        path = Path("p2", "tokenizer.json")
        path.write_text(path.read_text().replace('"Ġ"', '"Ġx"'))
        assert data.read_meta("p1") == data.read_meta("p2")
    else:
        shutil.copytree("p1", "p2")
        Path("p2", "meta.json").unlink()
    got = "p2, which has no meta.json" if kind == "none" else "another in p2/meta.json"
    expected = (
        f"[data] shards that are read together must be of one tokenizer, as p1/meta.json describes it, but got {got}."
    )
    for call in (
        lambda: resolve.resolve(config("p?/train_*.bin"), here),
        lambda: data.tokens("p?/train_*.bin", 16, 32),
    ):
        with pytest.raises(HandgradError) as error:
            call()
        assert str(error.value) == expected


def test_folders_without_meta_hold_tokens_of_gpt2(here):
    for name in ("p1", "p2"):
        Path(name).mkdir()
        data.write_shard(f"{name}/train_0.bin", [np.arange(40_000, 41_000)], np.dtype("<u4"))
    assert tokenizer_of(data.find_shards("p?/train_*.bin")) is tokenizers.gpt2()
    data.write_shard("p2/train_0.bin", [np.arange(60_000, 61_000)], np.dtype("<u4"))
    with pytest.raises(HandgradError, match="must hold ids below the vocabulary size 50257, but got 60"):
        resolve.resolve(config("p2/train_*.bin"), here)


def test_meta_of_another_size_than_its_tokenizer(here):
    chars("p")
    path = Path("p", "meta.json")
    meta = json.loads(path.read_text())
    for size, message in (
        (2**31 - 1, "p/meta.json gives the 15 tokens of its tokenizer as 'vocab_size', but got 2147483647"),
        (10**30, "must hold a 'vocab_size' of 1 to 2,147,483,647, but got 1" + "0" * 30),
        (0, "but got 0"),
        (-5, "but got -5"),
    ):
        path.write_text(json.dumps(meta | {"vocab_size": size}))
        with pytest.raises(HandgradError, match=message):
            tokenizer_of(data.find_shards("p"))
    path.write_text(json.dumps(meta | {"train": {"tokens": "many"}}))
    with pytest.raises(HandgradError, match="must hold the number of train tokens, but got 'many'"):
        data.read_meta("p")
    path.write_text(" " * (2**24 + 1))
    with pytest.raises(HandgradError, match="must have at most 16,777,216 bytes"):
        data.read_meta("p")


# two sets -------------------------------------------------------------------------------------------------------------


def test_validation_shards_of_another_tokenizer_are_refused(here):
    data.prepare_text("my.txt", "g", tokenizers.gpt2())
    chars("p")
    line = (
        "[data] p must hold tokens of gpt2 (50,257 tokens), the tokenizer of the training data in g, "
        "but got those of chars (15 tokens). p/meta.json says so."
    )
    for val in ("p/val_*.bin", "p"):
        with pytest.raises(HandgradError) as error:
            resolve.resolve(config("g", val=val), here)
        assert str(error.value) == line
    with pytest.raises(HandgradError, match=r"g must hold tokens of chars \(15 tokens\), .* those of gpt2"):
        resolve.resolve(config("p", val="g"), here)
    chars("p2")
    assert resolve.resolve(config("p", val="p2"), here).val.folder == Path("p2")
    Path("p2", "meta.json").unlink()  # without a record, the ids decide
    assert resolve.resolve(config("p", val="p2/val_*.bin"), here).val.meta is None
    chars("p3", "xyz")
    Path("p3", "meta.json").unlink()
    data.write_shard("p3/val_000000.bin", [np.full(100, 17)], np.dtype("<u2"))
    with pytest.raises(HandgradError, match="below the vocabulary size 15, but got 17"):
        resolve.resolve(config("p", val="p3/val_*.bin"), here)


def test_evaluation_shards_of_another_tokenizer_are_refused(here):
    chars("p")
    chars("q", "abcxyz")
    trained(config("p"))
    from handgrad.cli.__main__ import main

    assert main("eval run --tasks val=p/val_*.bin --threads 1".split()) == 0
    assert main("eval run --tasks val=p --threads 1".split()) == 0
    assert main("eval run --tasks val --threads 1".split()) == 0
    with pytest.raises(HandgradError) as error:
        from handgrad.cli.eval import main as evaluate

        evaluate("run --tasks val=q/val_*.bin --threads 1".split())
    assert str(error.value) == (
        "[data] q must hold tokens of chars (15 tokens), the tokenizer of the model run/step_000001, "
        "but got those of chars (18 tokens). q/meta.json says so."
    )


def test_evaluation_file_records_its_tokenizer(here):
    """A file of characters reads back under any characters, so its ids alone do not show whose they are."""
    row = {"ctx": "0123", "endings": ["1", "2", "3", "4"], "label": 0}
    Path("q.jsonl").write_text(json.dumps(row) + "\n")
    mine, other = tokenizers.chars("0123456789 "), tokenizers.chars("9876543210 abc")
    path, _ = data.prepare_questions("hellaswag", "h", mine, "q.jsonl")
    assert data.tokens_record(path) == {"tokenizer": "chars", "vocab_size": 11, "tokens": data.tokens_digest(mine)}
    assert set(data.check("h")) == {"hellaswag_val.bin", "hellaswag_val.bin.json"}
    (item,) = evals.read_items("hellaswag", path, mine)
    with pytest.raises(HandgradError) as error:
        evals.read_items("hellaswag", path, other)
    assert str(error.value) == (
        f"[eval] {path} must hold tokens of chars (14 tokens), the model's tokenizer, but got those of chars (11 tokens). "
        f"{path}.json says so. hint: a .jsonl fits every model"
    )
    Path(f"{path}.json").unlink()
    assert evals.read_items("hellaswag", path, other) == [item]  # without a record, ids that fit are accepted
    Path(f"{path}.json").write_text('{"tokens": 3}')
    with pytest.raises(HandgradError, match="hellaswag_val.bin.json must hold 'tokenizer' of type str"):
        evals.read_items("hellaswag", path, mine)
    data.write_choices(path, data.read_choices(path))  # of an unknown tokenizer: the older record is gone
    assert data.tokens_record(path) is None


def test_digest_depends_on_every_token():
    digests = {data.tokens_digest(tokenizers.chars(text)) for text in ("abc", "abd", "abcd", "ab")}
    assert len(digests) == 4 and data.tokens_digest(tokenizers.chars("cab")) in digests
    assert data.tokens_digest(tokenizers.gpt2()) == data.tokens_digest(tokenizers.gpt2())
