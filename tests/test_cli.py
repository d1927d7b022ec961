"""The command line: help, wrong words and flags told in one line, every verb once."""

import io
import json
import os
import subprocess
import sys

import pytest
import tokenizers as library

from handgrad.cli.__main__ import VERBS, main
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.train.config import Config

TINY = (
    "--model.num-layers 2 --model.num-heads 2 --model.hidden-size 32 --model.max-seq-len 32 --run.micro-batch 2 "
    "--run.threads 1 --run.steps 3 --run.val-tokens 64 --run.sample-tokens 4"
).split()


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """A function that runs handgrad in an empty folder and returns its one line of error; nothing may be left over."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("[") and err.endswith("\n") and err.count("\n") == 1, out + err
        assert sorted(tmp_path.rglob("*")) == before
        return err.strip()

    return run


def shell(command, **kwargs):
    environment = os.environ | {"HANDGRAD": f"{sys.executable} -m handgrad.cli"}
    kwargs = {"shell": True, "executable": "/bin/bash", "capture_output": True, "text": True, "timeout": 120} | kwargs
    return subprocess.run(command.replace("handgrad", "$HANDGRAD"), env=environment, **kwargs)


# help -----------------------------------------------------------------------------------------------------------------


def test_usage_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main([]) == 2


@pytest.mark.parametrize("verb", [*VERBS, "data text"])
def test_help_of_every_verb(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: handgrad {verb}") and not err


def test_help_shows_every_flag_and_its_default(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--model.preset", "--model.depth", "--data.train", "--optim.schedule", "--run.resume", "--run.check"):
        assert flag in text
    assert "default: 2000" in text and "(required)" not in text


def test_help_is_quick():
    """What only drawing, logging or judging needs is not imported for it."""
    code = "import sys; from handgrad.cli.__main__ import main; main(['train', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "tensorboard", "torch", "transformers"} & set(done.stdout.splitlines()[-1].split())


# wrong words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            "trian",
            "[handgrad] the verb is one of train, generate, eval, convert, report, explain, "
            "profile, data, ops, doctor, but got 'trian'. hint: did you mean handgrad train?",
        ),
        (
            "train --run.stepps 3",
            "[train] flags are those of --help, but got '--run.stepps'. hint: did you mean --run.steps?",
        ),
        ("train --steps=3", "[train] flags are those of --help, but got '--steps'. hint: did you mean --run.steps?"),
        ("train --run.lr 1", "[train] flags are those of --help, but got '--run.lr'. hint: did you mean --optim.lr?"),
        ("train --quiet", "[train] flags are those of --help, but got '--quiet'. hint: handgrad train --help"),
        ("train --run.steps many", "[train] --run.steps takes a whole number, but got 'many'."),
        ("train --run.micro_batch=1.5", "[train] --run.micro-batch takes a whole number, but got '1.5'."),
        ("train --run.steps", "[train] --run.steps takes a whole number, but got nothing."),
        ("train --run.steps --run.resume", "[train] --run.steps takes a whole number, but got nothing."),
        ("train --run.deterministic=yes", "[train] --run.deterministic takes nothing, but got 'yes'."),
        ("train --optim.final half", "[train] --optim.final takes a number or None, but got 'half'."),
        (
            "train --optim.warmup soon",
            "[train] --optim.warmup takes a whole number or None, but got 'soon'.",
        ),
        (
            "train --optim.schedule cosinus",
            "[train] --optim.schedule takes one of cosine, linear, constant, wsd, but got 'cosinus'.",
        ),
        (
            "train fast",
            "[train] after the verb come flags, but got 'fast'. "
            "hint: handgrad train --help; for llm.c's letters: docs/from-llmc.md",
        ),
        (
            "train --batch-size 4",
            "[train] flags are those of --help, but got '--batch-size'. hint: did you mean --data.batch-tokens?",
        ),
        (
            "train --run.bogus 1",
            "[train] flags are those of --help, but got '--run.bogus'. hint: handgrad train --help",
        ),
        ("train --run.steps -1", "[run] --run.steps is a number from 0 on, but got -1."),
        ("train --run.keep-last -1", "[run] --run.keep-last is a number from 0 on, but got -1."),
        ("train --optim.lr nan", "[optim] --optim.lr is a number from 0 on, but got nan."),
        ("train --optim.lr inf", "[optim] --optim.lr is a number from 0 on, but got inf."),
        ("train --model.num-layers -2", "[model] --model.num-layers is a number from 0 on, but got -2."),
        ("generate", "[generate] after the verb come RUN and flags, but got nothing. hint: handgrad generate --help"),
        ("generate a b", "[generate] after the verb come RUN and flags, but got 'a b'. hint: handgrad generate --help"),
        (
            "data",
            "[data] the recipe is one of shakespeare, tinystories, fineweb, fineweb-edu, openwebtext, jsonl, parquet, text, "
            "hellaswag, mmlu, check, but got nothing. hint: handgrad data RECIPE [FILE...] [flags]",
        ),
        ("data check", "[data] after check comes a folder, but got nothing."),
        ("data text", "[data] text comes from at least one file, but got none. hint: handgrad data text FILE..."),
        ("ops chekc", "[ops] MODE is one of support, check, grad, bench, but got 'chekc'."),
        ("explain --micro-batch 0", "[explain] --micro-batch is at least 1, but got 0."),
        (
            "explain --head-mib -1",
            "[explain] --head-mib is at least 0, but got -1.",
        ),
        ("explain --vocab-size -1", "[model] vocab_size is at least 1, but got -1."),
        ("explain --dropout 1", "[model] dropout lies in [0, 1), but got 1.0."),
    ],
)
def test_wrong_words(told, argv, line):
    assert told(*argv.split()) == line


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("explain gpt2-125m", ("[model] a preset is one of tiny, gpt2-124m,", "or d<layers>, but got 'gpt2-125m'.")),
        ("ops check atention", ("[ops] an op is one of ", "'atention'")),
        ("explain tiny --seq-len 65", ("[train] the model reads at most 64 tokens, but got seq_len 65.",)),
    ],
)
def test_wrong_names(told, argv, parts):
    line = told(*argv.split())
    assert all(part in line for part in parts)


def test_flags_take_both_spellings():
    c = parse(Config, ["--run.micro_batch", "3", "--run.val-every=7", "--run.no-master-weights"], "train")
    assert (c.run.micro_batch, c.run.val_every, c.run.master_weights) == (3, 7, False)
    again = parse(Config, ["--run.steps", "5"], "train", c)
    assert (again.run.micro_batch, again.run.steps) == (3, 5)


@pytest.mark.parametrize("settings", [{"steps": "5"}, {"dtype": "f16"}, {"resume": 1}, {"skip_loss_z": None}])
def test_settings_check_their_types(settings):
    with pytest.raises(HandgradError, match=f"--run.{next(iter(settings)).replace('_', '-')} is"):
        Config().run.__class__(**settings)


# every verb -----------------------------------------------------------------------------------------------------------


def test_explain(capsys):
    argv = "explain tiny --micro-batch 2 --seq-len 16 --vocab-size 97 --dtype f32 --threads 1".split()
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "attention" in text and "arena" in text and "recompute block" in text and "1 threads" not in text


def test_ops_support_check_and_grad(capsys):
    assert main(["ops", "--threads", "1"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n {op} " in table for op in ("embed", "linear_backward_x", "lm_loss_forward_backward", "adamw"))
    assert table.isascii()
    assert main("ops check add dropout --threads 1".split()) == 0
    assert capsys.readouterr().out.count(" ok") == 4
    assert main("ops grad norm --threads 1".split()) == 0
    assert " ok" in capsys.readouterr().out
    assert main("ops bench fill --threads 1".split()) == 0
    assert "GB/s" in capsys.readouterr().out


def test_a_reader_that_leaves_early():
    done = shell("set -o pipefail; handgrad explain tiny --threads 1 | head -1; handgrad train --help | head -1")
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 2


# handgrad data text, and training on what it makes --------------------------------------------------------------------

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60


def byte_level(path):
    """Saves a tokenizer.json: byte-level BPE without merges, and an end of text."""
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))


@pytest.mark.parametrize("tokenizer", ["gpt2", "chars", "tokenizer.json"])
def test_text_to_shards_to_a_model_to_text(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "play.txt").write_text(TEXT)
    byte_level("tokenizer.json")
    assert main(f"data text play.txt --out mydata --tokenizer {tokenizer}".split()) == 0
    assert "handgrad train --data.train mydata" in capsys.readouterr().out
    assert main(["train", "--data.train", "mydata", "--run.out", "run", *TINY]) == 0
    (tmp_path / "mydata").rename("moved")  # a run folder stands alone
    capsys.readouterr()
    assert main("generate run --prompt To --max-tokens 4 --threads 1".split()) == 0
    assert capsys.readouterr().out.startswith("To")


def test_bad_texts(told, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "half.json").write_text('{"model": ')
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "in_the_way").write_text("")
    assert told("data", "text", "none.txt") == "[data] a text must be a file, but got none.txt, which is missing."
    assert "[data] the text must not be empty, but got 0 bytes" in told("data", "text", "empty.txt")
    assert "latin.txt must be UTF-8 text, but got byte 0xef at offset 2." in told("data", "text", "latin.txt")
    assert "latin.txt must be UTF-8" in told("data", "text", "latin.txt", "--tokenizer", "chars")
    assert "half.json must describe a tokenizer" in told("data", "text", "a.txt", "--tokenizer", "half.json")
    assert "no file gpt3" in told("data", "text", "a.txt", "--tokenizer", "gpt3")
    assert "in_the_way must be writable" in told("data", "text", "a.txt", "--out", "in_the_way")
    assert "val_fraction must lie in 0..1" in told("data", "text", "a.txt", "--val-fraction", "1")
    assert "shard_tokens must be at least 1" in told("data", "text", "a.txt", "--shard-tokens", "0")


def test_a_damaged_data_folder(told, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    assert main("data text a.txt --out folder --tokenizer chars".split()) == 0
    capsys.readouterr()
    path = tmp_path / "folder" / "meta.json"
    meta = json.loads(path.read_text())
    wrong = [meta | {"vocab_size": "64"}, meta | {"tokenizer": {"kind": "x"}}]
    for content in ("{", "[]", *map(json.dumps, wrong)):
        path.write_text(content)
        told("train", "--data.train", "folder")


def test_standard_input_as_a_prompt_must_be_text(told, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok\xff")))
    line = told("generate", "run", "--prompt", "-")
    assert line == "[generate] a prompt is UTF-8 text, but got byte 0xff at offset 2."
