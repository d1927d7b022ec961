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
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tokenizers as library

from handgrad import tokenizers
from handgrad.cli.__main__ import OTHERS, VERBS, main
from handgrad.cli.completion import KINDS, PLACES, Completion
from handgrad.cli.data import RECIPES
from handgrad.cli.examples import EXAMPLES
from handgrad.cli.flags import flags, parse
from handgrad.cli.names import ALIASES, HINTS, SAME
from handgrad.cli.ops import Ops
from handgrad.core.errors import HandgradError
from handgrad.models import preset, presets
from handgrad.ops import OPS
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
    assert "None: 2000" in text and "(required)" not in text


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
    assert PLACES["ops"][0] == get_args(get_type_hints(Ops)["mode"])
    assert PLACES["completion"][0] == get_args(get_type_hints(Completion)["shell"])
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
        ("handgrad train --preset gpt2-m", {"gpt2-medium"}),
        ("handgrad train --preset = tin", {"tiny"}),  # how bash splits --preset=tin
        ("handgrad train --init ll", {"llmc"}),
        ("handgrad train --init gpt", {"gpt2.bin"}),
        ("handgrad explain gpt2-x", {"gpt2-xl"}),
        ("handgrad profile d8", {"d84"}),
        ("handgrad explain --cal", {"--calls"}),
        ("handgrad ops ch", {"check"}),
        ("handgrad ops check lm_loss_", {"lm_loss_forward_backward"}),
        ("handgrad completion z", {"zsh"}),
        ("handgrad data text --tokenizer c", {"chars", "corpus"}),
        ("handgrad data text --tokenizer g", {"gpt2", "gpt2.bin"}),
        ("handgrad data c", {"chat", "check"}),
        ("handgrad data check p", {"plays"}),
        ("handgrad data text c", {"corpus"}),
    ],
)
def test_completion_in_bash(words, found, tmp_path, capsys):
    (tmp_path / "gpt2.bin").touch()
    (tmp_path / "plays").mkdir()
    (tmp_path / "corpus").touch()
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
    if name == "fish":
        two = "commandline -opc"
        assert f"__fish_seen_subcommand_from explain; and test (count ({two})) -eq 2' -f -a 'tiny gpt2-124m" in text
        assert f"__fish_seen_subcommand_from ops; and test (count ({two})) -gt 2' -f -a 'embed " in text
        assert f"__fish_seen_subcommand_from data; and test (count ({two})) -eq 2' -f -a 'shakespeare " in text
        assert "from data' -l tokenizer -r -a 'gpt2 chars'" in text and "from train' -l preset -x -a 'tiny " in text
    if shutil.which(name):
        subprocess.run([name, "-c", text], check=True)


# wrong words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            "trian",
            "[handgrad] the verb is one of train, generate, chat, embed, classify, eval, convert, report, explain, "
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
        ("train --steps many", "[train] --steps takes a whole number or None, but got 'many'."),
        ("train --micro_batch=1.5", "[train] --micro-batch takes a whole number, but got '1.5'."),
        ("train --steps", "[train] --steps takes a whole number or None, but got nothing."),
        ("train --steps --resume", "[train] --steps takes a whole number or None, but got nothing."),
        ("train --deterministic=yes", "[train] --deterministic takes nothing, but got 'yes'."),
        ("train --final half", "[train] --final takes a number or None, but got 'half'."),
        (
            "train --warmup soon",
            "[train] --warmup takes a number or None, but got 'soon'.",
        ),
        (
            "train --schedule cosinus",
            "[train] --schedule takes one of cosine, linear, constant, wsd, inverse_sqrt, polynomial, step, "
            "cosine_with_restarts or None, but got 'cosinus'. hint: did you mean cosine?",
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
            "[generate] after the verb come MODEL and flags, but got 'a b'. hint: --prompt b",
        ),
        (
            "data",
            "[data] the recipe is one of shakespeare, tinystories, fineweb, fineweb-edu, openwebtext, jsonl, json, parquet, text, labels, "
            "chat, tokens, tokenizer, hellaswag, mmlu, check, but got nothing. hint: handgrad data RECIPE [FILE...] [flags]",
        ),
        ("data check", "[data] after check comes a folder, but got nothing."),
        ("data text", "[data] text comes from at least one file, but got none. hint: handgrad data text FILE..."),
        (
            "generate --prompt X",
            "[generate] after the verb come MODEL and flags, but got no MODEL. hint: handgrad generate --help",
        ),
        (
            "ops chekc",
            "[ops] MODE is one of support, check, grad, bench, but got 'chekc'. hint: did you mean check?",
        ),
        (
            "ops check --backend gpu",
            "[ops] --backend takes one of cpu, cuda, but got 'gpu'. hint: did you mean cuda?",
        ),
        (
            "explain --gpu h1000",
            "[explain] --gpu takes one of a100, 4090, h100, h200, b200 or None, but got 'h1000'. hint: did you mean h100?",
        ),
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
        (
            "explain gpt2-125m",
            ("[model] a preset is tiny, gpt2,", "but got 'gpt2-125m'. hint: did you mean gpt2-124m?"),
        ),
        ("explain gpt2-small", ("but got 'gpt2-small'. hint: did you mean gpt2?",)),
        ("explain GPT3", ("but got 'GPT3'. hint: did you mean gpt3:c768?",)),
        ("explain d0", ("but got 'd0'. hint: did you mean d6?",)),
        ("ops check atention", ("[ops] an op is one of ", "'atention'. hint: did you mean attention?")),
        ("eval nowhere --tasks hella", ("[eval] a task is one of val, ", "'hella'. hint: did you mean hellaswag?")),
        ("data txt book.txt", ("[data] the recipe is one of ", "'txt'. hint: did you mean text?")),
        (
            "data hellaswag --tokenizer GPT-2",
            (
                "[data] --tokenizer is gpt2, chars, a file tokenizer.json or a folder",
                "got 'GPT-2'. hint: did you mean gpt2?",
            ),
        ),
        ("version", ("but got 'version'. hint: did you mean handgrad --version?",)),
        ("sample runs/a", ("but got 'sample'. hint: did you mean handgrad generate?",)),
        ("--steps 5", ("but got '--steps'. hint: handgrad train --steps 5",)),
        ("--prompt 'To be' generate run", ("but got '--prompt'. hint: handgrad generate --prompt 'To be' run",)),
        ("explain tiny --seq-len 65", ("[train] the model reads at most 64 tokens, but got seq_len 65.",)),
    ],
)
def test_wrong_names(told, argv, parts):
    line = told(*shlex.split(argv))
    assert all(part in line for part in parts)


def test_every_word_for_a_verb_or_a_preset_leads_to_one():
    assert not set(OTHERS) & set(VERBS)
    assert all(word == "--version" or word.split()[0] in VERBS for word in OTHERS.values())
    assert all(preset(name) for name in presets.OTHERS.values())
    for name in presets.OTHERS:
        with pytest.raises(HandgradError, match="did you mean"):
            preset(name)


def test_other_trainers_names_are_listed():
    page = (Path(__file__).parents[1] / "docs" / "other-trainers.md").read_text()
    rows = [f"| `--{ours}` | {', '.join(f'`--{n}`' for n in names.split())} |" for ours, names in SAME.items()]
    assert page.partition("| --- | --- |\n")[2].splitlines() == rows


def test_help_names_the_aliases(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "names of other trainers work too, such as --max-iters for --steps" in text


def test_help_of_data_check(capsys):
    assert main("data check --help".split()) == 0
    assert "check        FOLDER: verify its files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("fp16", "bf16"),
        ("float16", "bf16"),
        ("BFloat16", "bf16"),
        ("float32", "f32"),
        ("FP32", "f32"),
        ("TF32", "tf32"),
    ],
)
def test_other_words_for_a_dtype(told, word, ours):
    line = told("train", "--dtype", word)
    assert line == f"[train] --dtype takes one of auto, f32, tf32, bf16, but got '{word}'. hint: did you mean {ours}?"


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("--compile", "leave it out: there is nothing to compile, the kernels are hand-written"),
        ("--compile=False", "leave it out: there is nothing to compile, the kernels are hand-written"),
        ("--no-compile", "leave it out: there is nothing to compile, the kernels are hand-written"),
        ("--load_best_model_at_end True", "--keep-best, and then RUN/best"),
        ("--warmup_tokens 1000", "--warmup, in steps or as a fraction of them"),
        (
            "--gradient_accumulation_steps=8",
            "--batch-tokens, a multiple of --micro-batch x --seq-len",
        ),
        ("--dataset openwebtext", "--train FOLDER, which handgrad data makes"),
        ("--min_lr 1e-5", "--final, as a fraction of --lr"),
        ("--optim adamw", "--optimizer NAME (--help lists them)"),
        ("--fp16", "--dtype bf16, tf32 or f32; there is no float16"),
        ("--bf16", "--dtype bf16, tf32 or f32; there is no float16"),
        ("--lr_scheduler cosine", "--schedule cosine, linear, constant, wsd and others"),
        ("--context_length 1024", "--seq-len (tokens in a training sequence) or --max-seq-len (longest)"),
        ("--eval_iters 20", "--val-tokens, in tokens"),
        ("--num-samples 3", "repeat the command with another --seed"),
        ("--model.n_layers 3", "did you mean --num-layers?"),
    ],
)
def test_names_of_other_trainers_get_a_hint(told, argv, hint):
    flag = "--" + argv.split()[0].split("=")[0][2:].replace("_", "-")
    line = told("train", *argv.split())
    assert line == f"[train] flags are those of --help, but got '{flag}'. hint: {hint}"


def test_a_hint_names_only_flags_that_the_verb_has(told):
    """What --num-samples means is told where there is a --seed; a hint for train is none for another verb."""
    assert told("generate", "run", "--num-samples", "3").endswith("hint: repeat the command with another --seed")
    assert told("report", "run", "--num-samples", "3").endswith("hint: handgrad report --help")
    assert told("generate", "run", "--batch-size", "3").endswith("hint: handgrad generate --help")
    known = [dict(flags(getattr(import_module(f"handgrad.{m}"), name))) for m, name in KINDS.values() if name]
    for hint in HINTS.values():
        named = re.findall(r"--[a-z-]+", hint)
        assert not named or any(all(flag in verb for flag in named) for verb in known), hint
    assert not set(HINTS) & (set(ALIASES) | {flag[2:] for flag in known[0]})


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("mydata", "--train mydata"),
        ("'my data'", "--train 'my data'"),
        ("c.json", "--config c.json"),
        ("nowhere.yaml", "--config nowhere.yaml"),
        ("runs/short", "--resume runs/short"),
        ("gpt2-medium", "--preset gpt2-medium"),
        ("-b", "handgrad train --help; for llm.c's letters: docs/from-llmc.md"),
    ],
)
def test_a_word_without_its_flag(told, tmp_path, word, hint):
    for folder in ("mydata", "my data", "runs/short"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("c.json", "runs/short/log.jsonl"):
        (tmp_path / file).touch()
    argv = shlex.split(f"--steps 5 {word}")
    assert told("train", *argv) == f"[train] after the verb come flags, but got '{' '.join(argv)}'. hint: {hint}"


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
        "--num_iterations 5 --learning_rate=1e-3 --per_device_train_batch_size 3 --no-shuffle --max_grad_norm 0.5"
        " --recompute block --init_from=llmc --output_dir a",
        "--max_iters=5 --lr 1e-3 --micro-batch-size 3 --no-shuffle --gradient-clipping 0.5 --recompute block --init llmc"
        " --out a",
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
    assert "attention" in text and "activations  " in text and "1 threads" not in text
    assert "remedy" not in text  # none would save anything
    assert main("explain tiny --threads 1".split()) == 0
    saves = re.findall(r"^(?:recompute|micro-batch|head-mib) \w+ +[\d.]+ +([\d.-]+) ", capsys.readouterr().out, re.M)
    assert saves and all(float(mib) > 0 for mib in saves)


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


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_ops_keeps_words_whole_in_a_pipe(columns):
    """However narrow the terminal is said to be, a row is a line."""
    done = shell(f"COLUMNS={columns} handgrad ops", stdin=subprocess.DEVNULL)
    rows = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(" "))
    assert rows["op"].split() == ["oracle", "cpu", "cuda", "gradient", "cases"]
    assert rows["embed"].split() == ["yes", "f32", "bf16", "f32", "bf16", "rule", rows["embed"].split()[-1]]
    assert set(rows) == {"op", *OPS}
    below = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line and not line.startswith(" "))
    assert below == {name: f"{op.ins} -> {op.outs}" for name, op in OPS.items()}
    assert max(map(len, done.stdout.partition("\n\n")[0].splitlines())) <= 80


def test_ops_keeps_words_whole_on_a_terminal():
    pty = f"{sys.executable} -c 'import pty, sys; pty.spawn(sys.argv[1:])'"  # a terminal; its output is captured
    done = shell(f"TERM=xterm COLUMNS=80 LINES=24 {pty} handgrad ops", stdin=subprocess.DEVNULL)
    words = [word for name, op in OPS.items() for word in (name, *op.ins.split(), *op.outs.split())]
    assert "gradient" in done.stdout and set(words) <= set(done.stdout.replace(": ", " ").split())
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in done.stdout.splitlines()) <= 80


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
    assert told("data", "text", "a.txt", "--tokenizer", "gpt3").endswith("but got 'gpt3'. hint: did you mean gpt2?")
    assert told("data", "text", "a.txt", "--tokenizer", "char").endswith("but got 'char'. hint: did you mean chars?")
    assert "no file bpe" in told("data", "text", "a.txt", "--tokenizer", "bpe")
    assert "in_the_way must be writable" in told("data", "text", "a.txt", "--out", "in_the_way")
    assert "val_fraction must lie in 0..1" in told("data", "text", "a.txt", "--val-fraction", "1")
    assert "shard_tokens must be at least 1" in told("data", "text", "a.txt", "--shard-tokens", "0")


@pytest.mark.parametrize(
    ("characters", "last"),
    [
        (6, "a sequence of handgrad train takes 65 tokens, and the smaller part has 1: add text"),
        (100, "train on it: handgrad train --train data --seq-len 9"),
        (1000, "train on it: handgrad train --train data"),
    ],
)
def test_a_text_too_short_to_train_on_says_so(tmp_path, monkeypatch, capsys, characters, last):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text((TEXT * 10)[:characters])
    assert main("data text small.txt --tokenizer chars".split()) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(last) and ("add text" in out) == (characters < 650)
    assert out.count("tokens in 1 shard\n") == 2
    if characters > 6:  # what it says works
        argv = shlex.split(last)[shlex.split(last).index("train", 3) :]
        assert main([*argv, *TINY, "--sample-tokens", "0"]) == 0


def test_a_prompt_that_the_data_cannot_spell_is_named(told, tmp_path, capsys):
    line = told("train", "--prompt", "Romeo & Zoë")
    assert line.startswith("[run] --prompt is spelled with the data's characters, but got 'ë' at character 10. hint:")
    hint = "hint: leave it out; a model trained with the gpt2 tokenizer reads every character"
    with pytest.raises(HandgradError, match=hint):
        tokenizers.chars("abc").encode("abd")


def test_help_of_data(capsys):
    assert main("data text --help".split()) == 0
    text = capsys.readouterr().out
    assert "FILE..." in text and "[STR" not in text
    assert main("data shakespeare --help".split()) == 0
    assert "empty: plays for shakespeare" in " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())


def test_profile_takes_a_vocabulary(capsys):
    assert main("profile tiny --vocab-size 64 --steps 1 --micro-batch 1 --seq-len 16 --threads 1".split()) == 0
    assert "tiny, 1 x 16 tokens" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "argv",
    [
        "data text a.txt --tokenizer LONG",
        "train --config LONG.json",
        "train LONG",
        "report LONG",
        "profile tiny --trace LONG/a",
    ],
)
def test_names_that_are_too_long_are_one_line(told, argv):
    assert told(*argv.replace("LONG", "9" * 400).split())
