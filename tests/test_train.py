"""handgrad train: what a run leaves behind, what the settings come to, and what stops a run before or while it goes."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from handgrad import io, models
from handgrad.cli.__main__ import main
from handgrad.data import id_dtype, write_shard
from handgrad.train.config import Config
from handgrad.train.outliers import WINDOW
from handgrad.train.trainer import Trainer

SHARDS = "handgrad data makes them; relative paths begin in this folder"
TINY = (
    "--model.num-layers 2 --model.num-heads 2 --model.hidden-size 32 --model.max-seq-len 32 "
    "--run.micro-batch 2 --run.threads 1 --run.steps 6 --optim.warmup 2 --run.val-tokens 64 --run.sample-tokens 0"
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
        assert main(["train", "--data.train", "words", *TINY, *flags]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(r"\[.*\n", err), err
        assert made or tree(Path(".")) == before
        return err.strip()

    return run


def tree(folder):
    """Every path below a folder and what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train(*flags):
    return main(["train", "--data.train", "words", "--run.out", "run", *TINY, *flags])


def log():
    return [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]


# what a run leaves behind ---------------------------------------------------------------------------------------------


def test_the_run_folder(words, capsys):
    assert train(*"--run.sample-tokens 8 --run.val-every 4 --run.save-every 2 --run.prompt abc".split()) == 0
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
    assert train("--model.dropout", "0.1") == 0
    table = capsys.readouterr().out
    saved = json.loads(Path("run/config.json").read_text())
    assert saved["model"] == {
        "family": "gpt2",
        "preset": "tiny",
        "depth": 0,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_size": 32,
        "max_seq_len": 32,
        "vocab_size": 97,
        "dropout": 0.1,
        "tie_embeddings": True,
        "init": "random",
    }
    assert (saved["data"]["seq_len"], saved["data"]["batch_tokens"]) == (32, 64)
    assert (saved["optim"]["final"], saved["optim"]["warmup"]) == (0.1, 2)
    assert (saved["run"]["out"], saved["run"]["dtype"] in ("f32", "bf16")) == ("run", True)
    for group, values in saved.items():
        for name, value in values.items():
            shown = repr(value) if isinstance(value, str) else str(value)
            assert re.search(rf"\b{name.replace('_', '-')} +{re.escape(shown)}\s", table), (group, name)


def test_defaults_are_the_recipe():
    c = Config()
    assert models.preset(c.model.preset) | {"vocab_size": 0} == dict(
        num_layers=4, num_heads=4, hidden_size=128, max_seq_len=64, vocab_size=0
    )
    assert (c.run.micro_batch, c.run.steps, c.optim.schedule, c.optim.warmup) == (12, 2000, "cosine", 100)
    assert c.data.train == "shakespeare"


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--model.depth 1", (1, 1, 64, 1024)),
        ("--model.preset d6 --model.num-layers 1", (1, 6, 384, 1024)),
        ("--model.preset gpt3:c384 --model.num-layers 1 --model.max-seq-len 16", (1, 6, 384, 16)),
        ("--model.preset gpt2-124m --model.num-layers 1 --model.hidden-size 24", (1, 12, 24, 1024)),
    ],
)
def test_sizes_by_preset_dial_and_flag(words, flags, sizes):
    rest = "--data.train words --run.out run --run.threads 1 --run.steps 1 --run.micro-batch 1 --data.seq-len 16"
    assert main(["train", *rest.split(), "--run.val-every", "0", "--run.sample-tokens", "0", *flags.split()]) == 0
    model = json.loads(Path("run/config.json").read_text())["model"]
    assert (model["num_layers"], model["num_heads"], model["hidden_size"], model["max_seq_len"]) == sizes
    assert io.load_meta("run/step_000001")["model"]["hidden_size"] == sizes[2]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_by_name(words, schedule):
    assert train("--optim.schedule", schedule, "--optim.lr", "0.01") == 0
    rates = [line["lr"] for line in log()]
    final = {"cosine": 0.001, "linear": 0.0, "constant": 0.01, "wsd": 0.0}[schedule]
    assert rates[:2] == [0.005, 0.01] and rates[-1] == pytest.approx(final)


def test_folders_are_numbered(words):
    for _ in range(2):
        assert main(["train", "--data.train", "words", *TINY, "--run.steps", "1"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["words-001", "words-002"]
    assert main(["train", "--data.train", "words", "--run.resume", "auto", "--run.steps", "2"]) == 0
    assert json.loads(Path("runs/words-002/config.json").read_text())["run"]["out"] == "runs/words-002"
    assert (Path("runs/words-002/step_000002/DONE")).exists() and not Path("runs/words-001/step_000002").exists()


def test_shards_from_elsewhere_are_read_with_gpt2s_vocabulary(words):
    (words / "words" / "meta.json").unlink()
    assert main(["train", "--data.train", "words/train_*.bin", "--run.out", "run", *TINY, "--run.steps", "1"]) == 0
    assert json.loads(Path("run/config.json").read_text())["model"]["vocab_size"] == 50257
    assert json.loads(Path("run/tokenizer-spec.json").read_text()) == {"kind": "gpt2"}


# mistakes that are known before: one line, and no run folder ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--model.dropout 1", "[model] dropout lies in [0, 1), but got 1.0."),
        ("--model.dropout -0.5", "[model] dropout lies in [0, 1), but got -0.5."),
        ("--model.num-heads 5", "[model] hidden_size is a multiple of num_heads, but got 32 and 5 heads."),
        ("--model.vocab-size 96", "[model] --model.vocab-size is at least the data's 97, but got 96."),
        ("--optim.beta2 1", "[optim] both betas lie in [0, 1), but got (0.9, 1.0)."),
        (
            "--optim.schedule constant --optim.final 0.5",
            "[schedule] a constant schedule ends at its peak (final 1.0), but got 0.5.",
        ),
        (
            "--data.seq-len 33",
            "[train] the model reads at most 32 tokens, but got seq_len 33. hint: --model.max-seq-len",
        ),
        (
            "--data.batch-tokens 100",
            "[data] batch_tokens must be a multiple of seq_len 32, but got 100. hint: 96 or 128 would do",
        ),
        (
            "--data.batch-tokens 96",
            "[train] batch_tokens is a multiple of micro_batch x seq_len = 2 x 32, but got 96. "
            "hint: --data.batch-tokens, --run.micro-batch",
        ),
        ("--run.head-mib -1", "[run] --run.head-mib is a number from 0 on, but got -1."),
        ("--run.threads -1", "[run] --run.threads is a number from 0 on, but got -1."),
        ("--run.backend cpu --run.dtype tf32", "[train] dtype is f32 or bf16 on the cpu backend, but got 'tf32'."),
        (
            "--run.backend cpu --run.grad-dtype bf16",
            "[train] grad_dtype is f32 on the cpu backend, but got 'bf16'.",
        ),
        (
            "--run.sample-tokens 1 --run.prompt €",
            "[run] --run.prompt is spelled with the data's characters, but got '€'. "
            "hint: another, or --run.sample-tokens 0",
        ),
        ("--data.train nowhere", f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}"),
        (
            "--data.train nowhere --model.vocab-size 64",
            f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}",
        ),
        ("--data.val nowhere", f"[data] at least one token shard must match nowhere, but got none. hint: {SHARDS}"),
    ],
)
def test_mistakes_in_settings(words, told, flags, line):
    assert told(*flags.split()) == line


def test_a_model_that_does_not_fit_says_what_would_help(words, told):
    line = told("--model.preset", "gpt3:c12288", "--model.num-layers", "96", "--model.hidden-size", "12288")
    assert line.startswith("[memory] the arena fits in memory") and "--run.recompute" in line


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
    assert "play.txt must" in told("--data.train", "play.txt")


def test_sequences_longer_than_the_data(words, told):
    flags = ["--model.max-seq-len", "9000", "--run.micro-batch", "1"]
    assert "a shard must hold seq_len + 1 = 9001 tokens, but got 5000" in told(*flags)


def test_a_bad_token_far_into_the_data_loses_no_work(words, told):
    """It cannot be known before; what was trained until then is saved."""
    ids = np.random.default_rng(0).integers(0, 97, 5000)
    ids[64 * 4 + 10] = 99
    write_shard(words / "words" / "train_0.bin", [ids], id_dtype(100))
    line = told("--run.out", "run", "--data.no-shuffle", "--run.val-every", "0", made=True)
    assert "must hold ids below the vocabulary size 97, but got 99." in line
    assert io.newest("run").name == "step_000004" and [line["step"] for line in log()] == [1, 2, 3, 4]


# the run folder -------------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_run(words, told):
    assert train() == 0
    assert told("--run.out", "run") == "[run] 'run' already holds a run. hint: --run.resume run, or another --run.out"


@pytest.mark.parametrize("out", ["a_file", "a_file/run"])
def test_a_file_where_the_run_folder_should_be(words, told, out):
    Path("a_file").write_text("precious")
    assert told("--run.out", out).startswith(f"[run] the run folder '{out}' cannot be written: ")
    assert Path("a_file").read_text() == "precious"


def test_a_mistake_leaves_what_was_in_the_folder(words, told):
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    told("--run.out", "run", "--data.train", "shakespeare", "--data.seq-len", "33")
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
    line = told("--run.out", "disk/run")
    assert line.startswith("[run] the run folder 'disk/run' cannot be written: Read-only file system.")


def test_a_disk_that_is_full_at_once(words, told, small_disk):
    small_disk("size=16k")
    line = told("--run.out", "disk/run", "--data.train", "shakespeare")
    assert line.startswith("[data] disk/run/data/") and "No space left on device" in line


def test_a_disk_that_fills_up_while_saving(words, told, small_disk):
    """The checkpoints before it stay whole; with room again the run goes on like one that always had it."""
    flags = ["--run.save-every", "2", "--run.keep-last", "9", "--run.dtype", "f32"]
    assert train(*flags) == 0
    size = sum(path.stat().st_size for path in Path("run/step_000006").iterdir())
    small_disk(f"size={int(2.5 * size) >> 10}k")
    line = told("--run.out", "disk/run", *flags, made=True)
    assert line.startswith("[checkpoint] disk/run/step_000006 must be writable, but got ") and "No space left" in line
    kept = sorted(path.name for path in Path("disk/run").glob("step_*"))
    assert kept == ["step_000002", "step_000004"]
    subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
    assert main(["train", "--run.resume", "disk/run"]) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        assert Path("run/step_000006", name).read_bytes() == Path("disk/run/step_000006", name).read_bytes()


# guards ---------------------------------------------------------------------------------------------------------------


def test_updates_that_are_not_finite_are_skipped_and_named_and_end_the_run(words, told):
    flags = ["--run.out", "run", "--optim.lr", "1e30", "--optim.clip", "0", "--optim.warmup", "0", "--run.steps", "50"]
    line = told(*flags, "--run.max-skipped", "3", made=True)
    bad = [line for line in log() if "event" in line]
    first = bad[0]["step"]
    assert [event["step"] for event in bad] == list(range(first, first + 4))
    assert all(re.match(r"update skipped: (loss|grad_norm) is (nan|inf)", event["event"]) for event in bad)
    assert re.match(rf"\[train\] 4 updates in a row were skipped, the last at step {first + 3}: ", line)
    steps = {line["step"]: line for line in log() if "event" not in line}
    assert sorted(steps) == list(range(1, first + 4)) and first < 10
    assert steps[first]["loss"] is None or steps[first]["grad_norm"] is None


def test_nan_check_names_call_block_and_source_line(words, told):
    line = told("--run.out", "run", "--optim.lr", "1e30", "--optim.warmup", "0", "--run.check", "nan", made=True)
    rule = r"\[check\] every output is finite, but got a non-finite value"
    assert re.match(rf"{rule} in '\w+' of \w+ \w+\. block \S+, \S+\.py:\d+\.", line), line


def test_updates_far_outside_the_last_ones_are_skipped(words):
    """A loss spike once 128 losses are known: a stretch of the data that is another language."""
    ids = np.tile(np.arange(7), 3000)
    batch, spike = 64, WINDOW + 8
    ids[batch * spike : batch * (spike + 1)] = np.random.default_rng(0).integers(50, 97, batch)
    write_shard(words / "words" / "train_0.bin", [ids], id_dtype(97))
    flags = ["--data.no-shuffle", "--run.val-every", "0", "--run.steps", str(spike + 10), "--optim.lr", "0.01"]
    assert train(*flags, "--run.skip-loss-z", "5") == 0
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


# divergence -----------------------------------------------------------------------------------------------------------


def spoil(monkeypatch, number, value):
    """Writes a value into a weight before a step, once earlier checkpoints are complete."""
    step = Trainer.step

    def then(self, at, lr):
        if at == number:
            self.wait_saved()
            self.params()["ln_f.weight"][...] = value
        with np.errstate(all="ignore"):
            return step(self, at, lr)

    monkeypatch.setattr(Trainer, "step", then)


EVERY_STEP = ["--run.save-every", "1", "--run.keep-last", "2", "--run.dtype", "f32", "--run.backend", "cpu"]


def test_skipped_updates_replace_no_good_checkpoint(words, told, monkeypatch):
    """Weights that are finite and whose loss is not: more skips than are kept checkpoints. Steps 3 and 4 stay."""
    with monkeypatch.context() as patch:
        spoil(patch, 5, 3e38)
        line = told("--run.out", "run", *EVERY_STEP, "--run.steps", "20", "--run.max-skipped", "3", made=True)
    assert line.startswith("[train] 4 updates in a row were skipped, the last at step 8: loss is ")
    kept = [path.name for path in io.complete("run")]
    assert kept == [f"step_{step:06d}" for step in (7, 6, 5, 4, 3)]
    hint = f"delete {', '.join(kept[:3])} and resume run/step_000004, the last good checkpoint, by --resume run"
    assert line.endswith(f"hint: {hint} with a lower --lr; --check nan names the call")
    assert Path("run/report.html").exists()
    for name in kept[:3]:
        shutil.rmtree(Path("run") / name)
    assert main(["train", "--run.resume", "run", "--run.steps", "10"]) == 0
    assert [path.name for path in io.complete("run")] == ["step_000010", "step_000009"]  # and are then replaced


def test_without_a_good_checkpoint_the_hint_names_none(words, told, monkeypatch):
    spoil(monkeypatch, 1, 3e38)
    line = told("--run.out", "run", *EVERY_STEP, "--run.max-skipped", "2", made=True)
    assert "hint: there is no checkpoint from before them: start again with a lower --lr" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(words, told, monkeypatch, value):
    with monkeypatch.context() as patch:
        spoil(patch, 5, value)
        line = told("--run.out", "run", *EVERY_STEP, "--run.steps", "20", made=True)
    rule = (
        "[checkpoint] weights and optimizer state in a checkpoint must be finite, but got an infinite value or NaN in "
    )
    hint = "resume from run/step_000004, which is whole, with a lower learning rate"
    assert line == f"{rule}'ln_f.weight' of step 5. hint: {hint}"
    assert [path.name for path in io.complete("run")] == ["step_000004", "step_000003"]
    assert main(["train", "--run.resume", "run", "--run.steps", "6", "--optim.lr", "1e-4"]) == 0


@pytest.mark.parametrize(("file", "name"), [("model", "ln_f.weight"), ("state.rank00", "v.ln_f.weight")])
def test_a_checkpoint_of_an_earlier_version_that_is_not_finite(words, told, file, name):
    """Asked for by name it is refused; `auto` takes the one before, and the log says so."""
    assert train(*EVERY_STEP) == 0
    path = Path(f"run/step_000006/{file}.safetensors")
    with safe_open(path, "np") as saved:
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}
    tensors[name][1] = np.inf
    io.checkpoint._write_tensors(path, tensors)
    shown = name if file != "model" else f"param.{name}"
    rule = "weights and optimizer state in a checkpoint must be finite, but got an infinite value or NaN in "
    rule = f"[checkpoint] {rule}'{shown}' of run/step_000006. hint: delete this folder "
    done = subprocess.run(
        [sys.executable, "-m", "handgrad.cli", "train", "--run.resume", "run", "--run.steps", "8"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(rule) and done.stderr.count("\n") == 1
    assert main(["train", "--run.out", "run", "--run.resume", "auto", "--run.steps", "8"]) == 0
    event = next(line for line in log() if "passed over" in line.get("event", ""))
    assert event["step"] == 5 and event["event"].startswith(f"passed over step_000006: {rule}")
    assert [line["step"] for line in log() if "loss" in line] == list(range(1, 9))
    with safe_open("run/step_000008/model.safetensors", "np") as saved:
        assert all(np.isfinite(saved.get_tensor(key)).all() for key in saved.keys())
