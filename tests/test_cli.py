"""The command line: help, wrong words and flags told in one line, every verb once."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
import tokenizers as library

from handgrad.cli.__main__ import VERBS, main
from handgrad.cli.completion import KINDS
from handgrad.cli.data import RECIPES
from handgrad.cli.examples import EXAMPLES
from handgrad.cli.flags import ALIASES, parse
from handgrad.core.errors import HandgradError
from handgrad.train.config import Config, from_names

TINY = (
    "--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 32 --micro-batch 2 "
    "--threads 1 --steps 3 --val-tokens 64 --sample-tokens 4"
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
    assert "--run." not in text and "--model." not in text
    for flag in ("--preset", "--depth", "--train", "--schedule", "--resume", "--check"):
        assert flag in text
    assert "default: 2000" in text and "(required)" not in text


def test_help_is_quick():
    """What only drawing, logging or judging needs is not imported for it."""
    code = "import sys; from handgrad.cli.__main__ import main; main(['train', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "tensorboard", "torch", "transformers"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("verb", EXAMPLES)
def test_examples_are_command_lines(verb, capsys):
    """Every line of an example parses, and --help shows it."""
    module, name = KINDS[verb.split()[0]]
    kind = getattr(import_module(f"handgrad.{module}"), name) if name else RECIPES[verb.split()[1]][0]
    lines = EXAMPLES[verb].strip().splitlines()
    for line in lines:
        command = re.search(r"handgrad [^>|)#]*", line).group()
        assert command.startswith(f"handgrad {verb}")
        parse(kind, shlex.split(command)[1 + len(verb.split()) :], verb)
    assert main([*verb.split(), "--help"]) == 0
    assert all(line in capsys.readouterr().out.replace("\n  ", "\n") for line in lines[:1])


def test_every_verb_has_examples_and_completion():
    assert {verb.split()[0] for verb in EXAMPLES} == set(VERBS) == set(KINDS)
    assert {verb.split()[1] for verb in EXAMPLES if verb.startswith("data ")} == set(RECIPES)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("handgrad tra", {"train"}),
        ("handgrad train --micro", {"--micro-batch"}),
        ("handgrad train --backend c", {"cpu", "cuda"}),
        ("handgrad data tinys", {"tinystories"}),
        ("handgrad report gpt", {"gpt2.bin"}),
    ],
)
def test_completion_in_bash(words, found, tmp_path, capsys):
    (tmp_path / "gpt2.bin").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + f"\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); "
    script += "_handgrad; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_completion_in_other_shells(name, capsys):
    """Their scripts name every verb and flag; they run only where the shell is installed."""
    assert main(["completion", name]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS) and ("-l micro-batch" if name == "fish" else "--micro-batch") in text
    if shutil.which(name):
        subprocess.run([name, "-c", text], check=True)


# wrong words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            "trian",
            "[handgrad] the verb is one of train, generate, eval, convert, report, explain, "
            "profile, data, ops, doctor, completion, but got 'trian'. hint: did you mean handgrad train?",
        ),
        (
            "train --stepps 3",
            "[train] flags are those of --help, but got '--stepps'. hint: did you mean --steps?",
        ),
        ("train --step=3", "[train] flags are those of --help, but got '--step'. hint: did you mean --steps?"),
        ("train --data.lr 1", "[train] flags are those of --help, but got '--data.lr'. hint: did you mean --lr?"),
        (
            "train --no-data.shuffle",
            "[train] flags are those of --help, but got '--no-data.shuffle'. hint: did you mean --no-shuffle?",
        ),
        ("train --quiet", "[train] flags are those of --help, but got '--quiet'. hint: handgrad train --help"),
        ("train --steps many", "[train] --steps takes a whole number, but got 'many'."),
        ("train --micro_batch=1.5", "[train] --micro-batch takes a whole number, but got '1.5'."),
        ("train --steps", "[train] --steps takes a whole number, but got nothing."),
        ("train --steps --resume", "[train] --steps takes a whole number, but got nothing."),
        ("train --deterministic=yes", "[train] --deterministic takes nothing, but got 'yes'."),
        ("train --final half", "[train] --final takes a number or None, but got 'half'."),
        (
            "train --warmup soon",
            "[train] --warmup takes a whole number or None, but got 'soon'.",
        ),
        (
            "train --schedule cosinus",
            "[train] --schedule takes one of cosine, linear, constant, wsd, but got 'cosinus'.",
        ),
        (
            "train fast",
            "[train] after the verb come flags, but got 'fast'. "
            "hint: handgrad train --help; for llm.c's letters: docs/from-llmc.md",
        ),
        (
            "train --batch-size 4",
            "[train] flags are those of --help, but got '--batch-size'. hint: --micro-batch (sequences at a time) or --batch-tokens (tokens in a step)",
        ),
        (
            "train --bogus 1",
            "[train] flags are those of --help, but got '--bogus'. hint: handgrad train --help",
        ),
        ("train --steps -1", "[run] --steps is a number from 0 on, but got -1."),
        ("train --keep-last -1", "[checkpoint] --keep-last is a number from 0 on, but got -1."),
        ("train --lr nan", "[optim] --lr is a number from 0 on, but got nan."),
        ("train --lr inf", "[optim] --lr is a number from 0 on, but got inf."),
        ("train --num-layers -2", "[model] --num-layers is a number from 0 on, but got -2."),
        ("generate", "[generate] after the verb come MODEL and flags, but got nothing. hint: handgrad generate --help"),
        (
            "generate a b",
            "[generate] after the verb come MODEL and flags, but got 'a b'. hint: handgrad generate --help",
        ),
        (
            "data",
            "[data] the recipe is one of shakespeare, tinystories, fineweb, fineweb-edu, openwebtext, jsonl, parquet, text, "
            "hellaswag, mmlu, check, but got nothing. hint: handgrad data RECIPE [FILE...] [flags]",
        ),
        ("data check", "[data] after check comes a folder, but got nothing."),
        ("data text", "[data] text comes from at least one file, but got none. hint: handgrad data text FILE..."),
        ("ops chekc", "[ops] MODE is one of support, check, grad, bench, but got 'chekc'."),
        ("explain --micro-batch 0", "[compute] --micro-batch is a number from 1 on, but got 0."),
        (
            "explain --head-mib -1",
            "[compute] --head-mib is a number from 0 on, but got -1.",
        ),
        ("explain tiny --seq-len -1", "[explain] --seq-len is a number from 0 on, but got -1."),
        ("explain tiny --batch-tokens -768", "[explain] --batch-tokens is a number from 0 on, but got -768."),
        ("profile tiny --seq-len -5", "[profile] --seq-len is a number from 0 on, but got -5."),
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
    c = parse(Config, ["--micro_batch", "3", "--val-every=7", "--no-master-weights"], "train")
    assert (c.compute.micro_batch, c.eval.val_every, c.compute.master_weights) == (3, 7, False)
    again = parse(Config, ["--steps", "5"], "train", c)
    assert (again.compute.micro_batch, again.run.steps) == (3, 5)


@pytest.mark.parametrize(
    "argv",
    [
        "--steps 5 --lr 1e-3 --micro-batch 3 --no-shuffle --clip 0.5 --recompute block --init llmc --out a",
        "--run.steps 5 --optim.lr=1e-3 --compute.micro_batch 3 --data.no-shuffle --optim.clip 0.5"
        " --compute.recompute block --model.init llmc --run.out a",
        "--run.steps 5 --optim.lr 1e-3 --run.micro-batch 3 --data.no-shuffle --optim.clip 0.5 --run.recompute block"
        " --model.init llmc --run.out a",  # as they were called when `run` was one large group
        "--max-steps 5 --learning-rate 1e-3 --micro_batch 3 --no_shuffle --grad-clip 0.5"
        " --activation-checkpointing block --init-from llmc --out-dir a",
    ],
)
def test_every_name_of_a_flag_is_the_same_flag(argv):
    c = parse(Config, argv.split(), "train")
    found = (c.run.steps, c.optim.lr, c.compute.micro_batch, c.data.shuffle, c.optim.clip, c.compute.recompute)
    assert found == (5, 1e-3, 3, False, 0.5, "block")
    assert (c.model.init, c.run.out) == ("llmc", "a")


def test_no_two_settings_have_the_same_name():
    names = [f.name for group in vars(Config()).values() for f in fields(group)]
    assert len(names) == len(set(names)) > 50 and not set(names) & {alias.replace("-", "_") for alias in ALIASES}


@pytest.mark.parametrize("settings", [{"steps": "5"}, {"dtype": "f16"}, {"resume": 1}, {"skip_loss_z": None}])
def test_settings_check_their_types(settings):
    with pytest.raises(HandgradError, match=f"--{next(iter(settings)).replace('_', '-')} is"):
        from_names(settings)


# every verb -----------------------------------------------------------------------------------------------------------


def test_explain(capsys):
    argv = "explain tiny --micro-batch 2 --seq-len 16 --vocab-size 97 --dtype f32 --threads 1".split()
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "attention" not in text and "7,2" not in text
    assert main([*argv, "--calls"]) == 0
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
    assert "handgrad train --train mydata" in capsys.readouterr().out
    assert main(["train", "--train", "mydata", "--out", "run", *TINY]) == 0
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
        told("train", "--train", "folder")


def test_standard_input_as_a_prompt_must_be_text(told, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok\xff")))
    line = told("generate", "run", "--prompt", "-")
    assert line == "[generate] a prompt is UTF-8 text, but got byte 0xff at offset 2."
