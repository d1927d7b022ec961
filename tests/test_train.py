"""handgrad train: what a run leaves behind, what the settings come to, and what stops a run before or while it goes."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from handgrad import io, models
from handgrad.cli.__main__ import main
from handgrad.data import id_dtype, tokens, write_shard
from handgrad.train.config import ComputeConfig, Config, RunConfig
from handgrad.train.folder import flat
from handgrad.train.outliers import WINDOW
from handgrad.train.resolve import complete
from handgrad.train.show import as_flags

SHARDS = "handgrad data makes them; relative paths begin in this folder"
TINY = (
    "--num-layers 2 --num-heads 2 --hidden-size 32 --max-seq-len 32 "
    "--micro-batch 2 --threads 1 --steps 6 --warmup 2 --val-tokens 64 --sample-tokens 0"
).split()


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The working folder, with a folder of shards `words`: 5000 ids below 97 for training, 500 for validation."""
    monkeypatch.chdir(tmp_path)
    meta = {
        "tokenizer": {"kind": "chars", "characters": "".join(map(chr, range(33, 130)))},
        "vocab_size": 97,
        "dtype": "uint16",
        "train": {},
        "val": {},
    }
    rng = np.random.default_rng(0)
    (tmp_path / "words").mkdir()
    for name, count in (("train_0.bin", 5000), ("val_0.bin", 500)):
        write_shard(tmp_path / "words" / name, [rng.integers(0, 97, count)], id_dtype(97))
    (tmp_path / "words" / "meta.json").write_text(json.dumps(meta))
    return tmp_path


@pytest.fixture
def told(capsys):
    """A function that runs `handgrad train` on `words`, which must fail with one line of error; returns that line."""

    def run(*flags, made=False):
        before = tree(Path("."))
        assert main(["train", "--train", "words", *TINY, *flags]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(r"\[.*\n", err), err
        assert made or tree(Path(".")) == before
        return err.strip()

    return run


def tree(folder):
    """Every path below a folder and what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train(*flags):
    return main(["train", "--train", "words", "--out", "run", *TINY, *flags])


def log():
    return [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]


# what a run leaves behind ---------------------------------------------------------------------------------------------


def test_the_run_folder(words, capsys):
    assert train(*"--sample-tokens 8 --val-every 4 --save-every 2 --prompt abc".split()) == 0
    names = {path.name for path in Path("run").iterdir()}
    assert names == {
        "config.json",
        "log.jsonl",
        "main.log",
        "memory.txt",
        "report.html",
        "run.json",
        "sample.txt",
        "tokenizer-spec.json",
        "step_000004",
        "step_000006",
    }
    lines = log()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6]
    keys = ["step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "seconds"]
    assert list(lines[5]) == keys and set(keys) - set(lines[4]) == {"val_loss"}
    text = Path("run/sample.txt").read_text()
    assert text.startswith("abc") and len(text) == 3 + 8 + 1
    out = capsys.readouterr().out
    assert text in out and "step 6/6 | loss" in out and "tok/s" in out and "in run: report.html" in out
    page = Path("run/report.html").read_text()
    assert (
        "<svg" in page
        and "hidden_size" in page
        and "abc" in page
        and not re.search("https?://", page.replace("http://www.w3.org", ""))
    )
    summary = json.loads(Path("run/run.json").read_text())["summary"]
    assert summary["tokens"] == 6 * 64 and summary["dtype"] in ("f32", "bf16") and summary["params"] > 20_000


def test_saved_settings_are_the_resolved_ones(words, capsys):
    assert train("--dropout", "0.1", "--verbose") == 0
    table = capsys.readouterr().out
    saved = json.loads(Path("run/config.json").read_text())
    assert saved["model"] == {
        "family": "gpt2",
        "preset": "tiny",
        "depth": 0,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 0,
        "hidden_size": 32,
        "head_size": 0,
        "mlp_size": 0,
        "max_seq_len": 32,
        "vocab_size": 97,
        "dropout": 0.1,
        "tie_embeddings": True,
        "init": "random",
    }
    assert (saved["data"]["seq_len"], saved["data"]["batch_tokens"]) == (32, 64)
    assert (saved["optim"]["final"], saved["optim"]["warmup"]) == (0.1, 2)
    assert (saved["run"]["out"], saved["compute"]["dtype"] in ("f32", "bf16")) == ("run", True)
    for name, value in flat(saved).items():  # --verbose prints them all
        assert as_flags({name: value}) in " ".join(table.split()), name


def test_defaults_are_the_recipe():
    c = Config()
    assert models.preset(c.model.preset) == models.GPT2(num_layers=4, num_heads=4, hidden_size=128, max_seq_len=64)
    assert (c.compute.micro_batch, c.run.steps, c.optim.schedule, c.optim.warmup) == (12, None, None, None)
    assert c.data.train == "shakespeare"


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--depth 1", (1, 1, 64, 1024)),
        ("--preset d6 --num-layers 1", (1, 6, 384, 1024)),
        ("--preset gpt3:c384 --num-layers 1 --max-seq-len 16", (1, 6, 384, 16)),
        ("--preset gpt2-124m --num-layers 1 --hidden-size 24", (1, 12, 24, 1024)),
    ],
)
def test_sizes_by_preset_dial_and_flag(words, flags, sizes):
    rest = "--train words --out run --threads 1 --steps 1 --micro-batch 1 --seq-len 16"
    assert main(["train", *rest.split(), "--val-every", "0", "--sample-tokens", "0", *flags.split()]) == 0
    model = json.loads(Path("run/config.json").read_text())["model"]
    assert (model["num_layers"], model["num_heads"], model["hidden_size"], model["max_seq_len"]) == sizes
    assert io.load_meta("run/step_000001")["model"]["hidden_size"] == sizes[2]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_by_name(words, schedule):
    assert train("--schedule", schedule, "--lr", "0.01") == 0
    """Six steps, two of them warm-up. The last one has done 3 of 4 steps of the shape; wsd decays from step 5 on (0.8 * 6
    = 4 steps are done before) and has done 1 of 2."""
    rates = [line["lr"] for line in log()]
    last = {"cosine": 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, "linear": 0.25, "constant": 1, "wsd": 1 - math.sqrt(0.5)}
    assert rates[:3] == [0.005, 0.01, 0.01] and rates[-1] == pytest.approx(0.01 * last[schedule])


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (19, 1), (999, 99), (2000, 100), (0, 15)])
def test_default_warmup_is_a_tenth_of_a_short_run(words, tiny, steps, warmup):
    """steps 0 is an epoch: 5000 tokens in sequences of 32 and their targets are 156 steps of one sequence."""
    data = tokens("words/train_*.bin", seq_len=32, batch_tokens=32)
    c = Config(run=RunConfig(steps=steps), compute=ComputeConfig(backend="cpu"))
    c = complete(c, tiny(), data, Path("run"))
    assert (c.optim.warmup, c.run.steps) == (warmup, steps or data.windows)
    kept = complete(replace(c, optim=replace(c.optim, warmup=7)), tiny(), data, Path("run"))
    assert kept.optim.warmup == 7


def test_a_run_that_is_all_warmup_says_so_and_reaches_the_peak(words, capsys):
    assert train("--warmup", "700", "--lr", "0.6") == 0
    assert "all 6 steps are warm-up; a smaller --warmup lets the rate decay" in capsys.readouterr().out
    assert [line["lr"] for line in log()] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_folders_are_numbered(words):
    for _ in range(2):
        assert main(["train", "--train", "words", *TINY, "--steps", "1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["words-001", "words-002"]
    assert main(["train", "--train", "words", "--resume", "auto", "--steps", "2"]) == 0
    assert json.loads(Path("runs/words-002/config.json").read_text())["run"]["out"] == "runs/words-002"
    assert (Path("runs/words-002/step_000002/DONE")).exists() and not Path("runs/words-001/step_000002").exists()


def test_shards_from_elsewhere_are_read_with_gpt2s_vocabulary(words):
    (words / "words" / "meta.json").unlink()
    assert main(["train", "--train", "words/train_*.bin", "--out", "run", *TINY, "--steps", "1"]) == 0
    assert json.loads(Path("run/config.json").read_text())["model"]["vocab_size"] == 50257
    assert json.loads(Path("run/tokenizer-spec.json").read_text()) == {"kind": "gpt2"}


# mistakes that are known before: one line, and no run folder ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--dropout 1", "[model] dropout lies in [0, 1), but got 1.0."),
        ("--dropout -0.5", "[model] dropout lies in [0, 1), but got -0.5."),
        ("--num-heads 5", "[model] hidden_size is a multiple of num_heads, but got 32 and 5 heads."),
        ("--vocab-size 96", "[model] --vocab-size is at least the data's 97, but got 96."),
        ("--beta2 1", "[optim] both betas lie in [0, 1), but got (0.9, 1.0)."),
        (
            "--schedule constant --final 0.5",
            "[schedule] a constant schedule ends at its peak (final 1.0), but got 0.5.",
        ),
        (
            "--seq-len 33",
            "[train] the model reads at most 32 tokens, but got seq_len 33. "
            "hint: a shorter seq_len, or a model with a larger max_seq_len",
        ),
        (
            "--batch-tokens 100",
            "[data] batch_tokens must be a multiple of seq_len 32, but got 100. hint: 96 or 128 would do",
        ),
        (
            "--batch-tokens 96",
            "[train] batch_tokens is a multiple of micro_batch x seq_len = 2 x 32, but got 96. hint: micro_batch 1",
        ),
        ("--head-mib -1", "[compute] --head-mib is a number from 0 on, but got -1."),
        ("--threads -1", "[compute] --threads is a number from 0 on, but got -1."),
        ("--backend cpu --dtype tf32", "[train] dtype is f32 or bf16 on the cpu backend, but got 'tf32'."),
        (
            "--backend cpu --grad-dtype bf16",
            "[train] grad_dtype is f32 on the cpu backend, but got 'bf16'.",
        ),
        (
            "--sample-tokens 1 --prompt €",
            "[run] --prompt is spelled with the data's characters, but got '€' at character 0. hint: another, or --sample-tokens 0",
        ),
        ("--train nowhere", f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}"),
        (
            "--train nowhere --vocab-size 64",
            f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}",
        ),
        ("--val nowhere", f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}"),
    ],
)
def test_mistakes_in_settings(words, told, flags, line):
    assert told(*flags.split()) == line


@pytest.mark.parametrize("flag", ["--out", "--resume"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "nul\0byte", "half\udc80\ud800"])
def test_a_name_that_the_system_does_not_take_is_one_line(words, told, flag, name):
    line = told(flag, name)
    longest = 200 + len(
        "[run] the run folder  cannot be used: File name too long. hint: another --out"
    )  # 200 of a name
    assert line.startswith("[run] the run folder '") and "cannot be used: " in line and len(line) <= longest


def test_a_long_name_in_new_folders_leaves_none(words, told):
    line = told("--out", f"x/{'y' * 250}/{'z' * 256}")
    assert line.endswith("cannot be written: File name too long. hint: another --out")


def test_a_team_of_too_many_threads_is_one_line(words, told):
    assert told("--threads", "100000").startswith("[backend] threads is at most 1024")


def test_a_model_that_does_not_fit_says_what_would_help(words, told):
    line = told("--preset", "gpt3:c12288", "--num-layers", "96", "--hidden-size", "12288")
    assert line.startswith("[memory] the arena fits in memory") and "recompute 'act' or 'block'" in line


def damage(path, how):
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "a token of another vocabulary":
        write_shard(path, [np.full(5000, 97)], id_dtype(98))
    else:
        wrong = {"empty": b"", "header cut off": raw[:500], "truncated": raw[:-10], "too long": raw + b"00"}
        wrong |= {"wrong magic": b"abcd" + raw[4:], "wrong version": raw[:4] + b"\7\0\0\0" + raw[8:]}
        path.write_bytes(wrong[how])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "at least one token shard must match"),
        ("empty", "must hold tokens, but got an empty file."),
        ("header cut off", "500"),
        ("truncated", "must"),
        ("too long", "must"),
        ("wrong magic", "magic"),
        ("wrong version", "version"),
        ("a token of another vocabulary", "must hold ids below the vocabulary size 97, but got 97."),
    ],
)
def test_damaged_shards(words, told, split, how, part):
    path = words / "words" / f"{split}_0.bin"
    if split == "val" and how == "missing":
        pytest.skip("a folder need not have a validation set")
    damage(path, how)
    line = told()
    assert line.startswith("[data] ") and part in line


def test_a_text_file_is_no_shard(words, told):
    Path("play.txt").write_text("To be, or not to be\n" * 100)
    assert "play.txt must" in told("--train", "play.txt")


def test_sequences_longer_than_the_data(words, told):
    flags = ["--max-seq-len", "9000", "--micro-batch", "1"]
    assert "a shard must hold a window of 9001 tokens, but got 5000" in told(*flags)


def test_a_bad_token_far_into_the_data_loses_no_work(words, told):
    """It cannot be known before; what was trained until then is saved."""
    ids = np.random.default_rng(0).integers(0, 97, 5000)
    ids[64 * 4 + 10] = 99
    write_shard(words / "words" / "train_0.bin", [ids], id_dtype(100))
    line = told("--out", "run", "--no-shuffle", "--val-every", "0", made=True)
    assert "must hold ids below the vocabulary size 97, but got 99." in line
    assert io.newest("run").name == "step_000004" and [line["step"] for line in log()] == [1, 2, 3, 4]


# the run folder -------------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_run(words, told):
    assert train() == 0
    assert told("--out", "run") == "[run] 'run' already holds a run. hint: --resume run, or another --out"


@pytest.mark.parametrize("out", ["a_file", "a_file/run"])
def test_a_file_where_the_run_folder_should_be(words, told, out):
    Path("a_file").write_text("precious")
    assert told("--out", out).startswith(f"[run] the run folder '{out}' cannot be written: ")
    assert Path("a_file").read_text() == "precious"


def test_a_mistake_leaves_what_was_in_the_folder(words, told):
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    told("--out", "run", "--train", "shakespeare", "--seq-len", "33")
    assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many KiB on the folder `disk`, or changes it by mount's other options."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not allowed here")

    yield mount
    with contextlib.suppress(OSError):
        subprocess.run(["umount", str(folder)], check=False)


def test_a_disk_that_is_read_only(words, told, small_disk):
    small_disk("size=1m,ro")
    line = told("--out", "disk/run")
    assert line.startswith("[run] the run folder 'disk/run' cannot be written: Read-only file system.")


def test_a_disk_that_is_full_at_once(words, told, small_disk):
    small_disk("size=16k")
    line = told("--out", "disk/run", "--train", "shakespeare")
    assert line.startswith("[data] disk/run/data/") and "No space left on device" in line


def test_a_disk_that_fills_up_while_saving(words, told, small_disk):
    """The checkpoints before it stay whole; with room again the run goes on like one that always had it."""
    flags = ["--save-every", "2", "--keep-last", "9", "--dtype", "f32"]
    assert train(*flags) == 0
    size = sum(path.stat().st_size for path in Path("run/step_000006").iterdir())
    small_disk(f"size={int(2.5 * size) >> 10}k")
    line = told("--out", "disk/run", *flags, made=True)
    assert line.startswith("[checkpoint] disk/run/step_000006 must be writable, but got ") and "No space left" in line
    kept = sorted(path.name for path in Path("disk/run").glob("step_*"))
    assert kept == ["step_000002", "step_000004"]
    subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
    assert main(["train", "--resume", "disk/run"]) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        assert Path("run/step_000006", name).read_bytes() == Path("disk/run/step_000006", name).read_bytes()


# guards ---------------------------------------------------------------------------------------------------------------


def test_updates_that_are_not_finite_are_skipped_and_named_and_end_the_run(words, told):
    flags = ["--out", "run", "--lr", "1e30", "--clip", "0", "--warmup", "0", "--steps", "50"]
    line = told(*flags, "--max-skipped", "3", made=True)
    bad = [line for line in log() if "event" in line]
    first = bad[0]["step"]
    assert [event["step"] for event in bad] == list(range(first, first + 4))
    assert all(re.match(r"update skipped: (loss|grad_norm) is (nan|inf)", event["event"]) for event in bad)
    assert re.match(rf"\[train\] 4 updates in a row were skipped, the last at step {first + 3}: ", line)
    steps = {line["step"]: line for line in log() if "event" not in line}
    assert sorted(steps) == list(range(1, first + 4)) and first < 10
    assert steps[first]["loss"] is None or steps[first]["grad_norm"] is None


def test_nan_check_names_call_block_and_source_line(words, told):
    line = told("--out", "run", "--lr", "1e30", "--warmup", "0", "--check", "nan", made=True)
    rule = r"\[check\] every output is finite, but got a non-finite value"
    assert re.match(rf"{rule} in '\w+' of \w+ \w+\. block \S+, \S+\.py:\d+\.", line), line


def test_updates_far_outside_the_last_ones_are_skipped(words):
    """A loss spike once 128 losses are known: a stretch of the data that is another language."""
    ids = np.tile(np.arange(7), 3000)
    batch, spike = 64, WINDOW + 8
    ids[batch * spike : batch * (spike + 1)] = np.random.default_rng(0).integers(50, 97, batch)
    write_shard(words / "words" / "train_0.bin", [ids], id_dtype(97))
    flags = ["--no-shuffle", "--val-every", "0", "--steps", str(spike + 10), "--lr", "0.01"]
    assert train(*flags, "--skip-loss-z", "5") == 0
    events = [line for line in log() if "event" in line]
    assert [line["step"] for line in events] == [spike + 1]
    rule = rf"update skipped: loss \S+ is \d+\.\d standard deviations above the last {WINDOW}"
    assert re.match(rule, events[0]["event"])
    without = log()[-1]["loss"]
    shutil.rmtree("run")
    assert train(*flags) == 0
    assert not [line for line in log() if "event" in line] and log()[-1]["loss"] != without


def test_settings_saved_with_a_checkpoint_describe_the_run(words):
    assert train() == 0
    saved = io.load_meta("run/step_000006")
    assert saved["config"] == json.loads(Path("run/config.json").read_text())
    assert set(saved["config"]) == set(asdict(Config()))
