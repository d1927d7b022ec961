"""A run that was stopped, killed or cut short goes on as if nothing had been: the same log, the same weights."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.data import id_dtype, write_shard
from handgrad.io import checkpoint
from handgrad.train.config import Config, RunConfig, from_names
from handgrad.train.folder import Lock, saved_settings
from handgrad.train.outliers import WINDOW
from handgrad.train.resolve import resolve
from handgrad.train.run import train

STEPS = 12


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder of shards: ids below 97 with much repetition."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    write_shard(folder / "train_0.bin", [np.cumsum(rng.integers(0, 3, 20_000)) % 97], id_dtype(97))
    write_shard(folder / "val_0.bin", [np.cumsum(rng.integers(0, 3, 500)) % 97], id_dtype(97))
    characters = "".join(map(chr, range(33, 130)))
    meta = {"tokenizer": {"kind": "chars", "characters": characters}, "vocab_size": 97, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": {}, "val": {}}))
    return str(folder)


def config(words, out, **run):
    """Two accumulated micro-batches a step, dropout, a checkpoint every 4 steps, a validation every 5."""
    settings = dict(num_layers=2, num_heads=2, hidden_size=32, max_seq_len=16, dropout=0.1)
    settings |= dict(train=words, batch_tokens=64, warmup=4, out=str(out), steps=STEPS, micro_batch=2, threads=1)
    settings |= dict(save_every=4, keep_last=9, val_every=5, val_tokens=64)
    settings |= dict(sample_tokens=4, sample_every=3, prompt="a")
    return from_names(settings | run)


def flags(c):
    """The settings as a command line."""
    words = []
    for group in vars(c).values():
        for name, value in vars(group).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words += [flag if value else f"--no-{name.replace('_', '-')}"]
            elif value is not None:
                words += [flag, str(value)]
    return words


def log(out):
    """The log without the two keys that tell the time."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights(out, step=STEPS):
    folder = Path(out) / f"step_{step:06d}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "state.rank00.safetensors")}


def same(out, other, step=STEPS):
    assert log(out) == log(other)
    assert weights(out, step) == weights(other, step)


def forget(out, after):
    """Leaves what a run that died before its next checkpoint had left."""
    for path in Path(out).glob("step_*"):
        if int(path.name[5:]) > after:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Run folders that nothing interrupted, by dtype."""
    made = {}

    def run(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("whole") / dtype
            assert train(config(words, made[dtype], dtype=dtype), quiet=True) == 0
        return made[dtype]

    return run


# in one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("after", [4, 8])
def test_resume_is_bit_for_bit(words, whole, tmp_path, dtype, after):
    assert [line["step"] for line in log(whole(dtype))] == list(range(1, STEPS + 1))
    shutil.copytree(whole(dtype), tmp_path / "run")
    forget(tmp_path / "run", after)
    assert train(config(words, tmp_path / "run", dtype=dtype, resume="auto"), quiet=True) == 0
    same(tmp_path / "run", whole(dtype))


def test_another_seed_is_another_run(words, whole, tmp_path):
    """The comparison above can fail."""
    assert train(config(words, tmp_path / "run", dtype="f32", seed=1), quiet=True) == 0
    with pytest.raises(AssertionError):
        same(tmp_path / "run", whole("f32"))


def test_outlier_windows_go_on(words, tmp_path):
    """Skips depend on the last 128 losses: a run resumed within a window skips the same updates."""
    settings = dict(
        steps=WINDOW + 30, save_every=WINDOW + 10, sample_tokens=0, skip_loss_z=1.0, skip_grad_z=1.0, max_skipped=99
    )

    def flat(out, **more):  # learns nothing, so that losses vary but do not fall
        return config(words, out, **settings | dict(lr=0.0, warmup=0), **more)

    assert train(flat(tmp_path / "whole"), quiet=True) == 0
    skips = [line["step"] for line in log(tmp_path / "whole") if "event" in line]
    assert min(skips) < WINDOW + 10 < max(skips)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    forget(tmp_path / "run", WINDOW + 10)
    assert train(flat(tmp_path / "run", resume="auto"), quiet=True) == 0
    same(tmp_path / "run", tmp_path / "whole", WINDOW + 30)


def test_resume_takes_the_saved_settings_under_the_flags(words, tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", *flags(config(words, out, steps=4))]) == 0
    assert main(["train", "--resume", out, "--steps", "6", "--lr=1e-4"]) == 0
    saved = saved_settings(Config(run=RunConfig(resume=out)))
    assert (saved.run.steps, saved.optim.lr, saved.model.dropout, saved.checkpoint.save_every) == (6, 1e-4, 0.1, 4)
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4, 4, 5, 6]
    assert log(out)[-1]["lr"] <= 1e-4 and log(out)[4]["event"].startswith(
        "from here on lr is 0.0001, not 0.002, steps is 6, not 4; the"
    )


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_that_goes_on_to_another_step_says_how_the_rate_jumps(words, tmp_path, schedule):
    """After 6 of 6 steps the cosine is near its end; of 12 steps, those 6 are half. A constant rate does not jump."""
    c = config(words, tmp_path / "run", steps=6, lr=0.5, schedule=schedule, warmup=2)
    assert train(c, quiet=True) == 0
    assert train(replace(c, run=replace(c.run, steps=12, resume="auto")), quiet=True) == 0
    lines = log(tmp_path / "run")
    (event,) = [line["event"] for line in lines if "event" in line]
    rates = {line["step"]: line["lr"] for line in lines if "loss" in line}
    if schedule == "constant":
        assert event == "from here on steps is 12, not 6" and set(rates.values()) == {0.25, 0.5}
        return
    before = 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 4)) / 2)  # step 6 has done 3 of 4 steps after warm-up
    after = 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 10)) / 2)  # step 7 has done 4 of 10
    assert (rates[6], rates[7]) == (pytest.approx(before), pytest.approx(after))
    jump = f"the learning rate goes from {before:.6g} to {after:.6g}"
    assert event == f"from here on steps is 12, not 6; {jump}"


def test_a_run_that_goes_on_unchanged_says_nothing(words, tmp_path):
    c = config(words, tmp_path / "run", steps=8)
    assert train(c, quiet=True) == 0
    forget(tmp_path / "run", 8)
    assert train(config(words, tmp_path / "run", steps=8, resume="auto", threads=2), quiet=True) == 0
    assert not [line for line in log(tmp_path / "run") if "event" in line]


def test_a_second_process_leaves_a_run_folder_alone(words, whole, tmp_path, capsys):
    """What the first one writes meanwhile would be deleted with what the second had made."""
    shutil.copytree(whole("f32"), tmp_path / "run")
    with Lock(tmp_path / "run"):
        assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "14"]) == 2
        rule = f"[run] another process is training in '{tmp_path}/run'."
        assert capsys.readouterr().err == rule + "\n"
        same(tmp_path / "run", whole("f32"))
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "14"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "15"]) == 0  # it was given back


def test_overfitting_stays_on_its_batch(words, tmp_path):
    """Also with a larger batch: the first sequences of the data, seen again."""
    first = []
    for batch_tokens, steps in ((64, 4), (128, 6)):
        c = config(words, tmp_path / "run", steps=steps, resume="auto")
        data = replace(c.data, batch_tokens=batch_tokens, overfit=True)
        trainer = resolve(replace(c, data=data), tmp_path / "run").trainer
        assert trainer.data.ahead == 0
        first.append(next(iter(trainer.data.batch(0, micro_batch=1).values())))
        if steps == 4:
            assert train(replace(c, data=replace(c.data, overfit=True)), quiet=True) == 0
    assert np.array_equal(*first)


def test_data_of_another_tokenizer_do_not_go_on(words, whole, tmp_path, capsys):
    shutil.copytree(whole("f32"), tmp_path / "run")
    shutil.copytree(words, tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    meta["tokenizer"]["characters"] = meta["tokenizer"]["characters"][::-1]
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta))
    again = ["train", "--resume", str(tmp_path / "run"), "--steps", "14", "--train"]
    assert main([*again, str(tmp_path / "other")]) == 2
    rule = f"[model] data for {tmp_path}/run/step_000012 are made with its tokenizer chars, to which 0 is"
    assert capsys.readouterr().err.startswith(rule)
    same(tmp_path / "run", whole("f32"))
    assert main([*again, words]) == 0


def test_a_finished_run_keeps_its_settings(words, whole, tmp_path, capsys):
    shutil.copytree(whole("f32"), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert main(["train", "--resume", str(tmp_path / "run"), "--lr=9", "--seed=5"]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    same(tmp_path / "run", whole("f32"))


def test_a_finished_run_has_nothing_to_do(words, whole, tmp_path):
    shutil.copytree(whole("f32"), tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    same(tmp_path / "run", whole("f32"))


@pytest.mark.parametrize(
    ("words_", "line"),
    [
        (
            "nowhere",
            "[resume] no folder 'nowhere'. hint: --resume auto --out nowhere starts afresh where there is none",
        ),
        (
            "empty",
            "[resume] no complete checkpoint in 'empty'. "
            "hint: --resume auto --out empty starts afresh where there is none",
        ),
        (
            "empty --out other",
            "[resume] --resume names the run folder, and --out the same or none, but got 'empty' and 'other'.",
        ),
    ],
)
def test_a_folder_without_a_checkpoint_is_a_mistake(tmp_path, monkeypatch, capsys, words_, line):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["train", "--resume", *words_.split()]) == 2
    assert capsys.readouterr().err == line + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not list(Path("empty").iterdir())


def test_nothing_to_resume_is_a_fresh_start(words, whole, tmp_path):
    assert train(config(words, tmp_path / "run", dtype="f32", resume="auto"), quiet=True) == 0
    same(tmp_path / "run", whole("f32"))


# in other pieces ------------------------------------------------------------------------------------------------------


def trainer(words, out, micro_batch=4, batch_tokens=128):
    """A trainer on windows of 16 tokens."""
    model, execution = hg.models.GPT2(97, 16, 2, 2, 32), hg.Execution(micro_batch, backend="cpu")
    data = hg.data.tokens(f"{words}/train_*.bin", 16, batch_tokens, seed=5)
    return hg.Trainer(model, hg.optim.AdamW(), data, precision=hg.Precision("f32"), execution=execution, out=out)


def test_p10_t8_another_micro_batch_reads_the_same_tokens(words, tmp_path):
    """To the last token; the losses are the same but for rounding, and to the bit where the micro-batch is the same."""
    whole, first = trainer(words, None), trainer(words, tmp_path)
    losses = [whole.step(step, 1e-3).loss for step in range(1, 9)]
    assert [first.step(step, 1e-3).loss for step in (1, 2, 3)] == losses[:3]
    first.save(3)
    for micro_batch in (1, 2, 4, 8):
        run = trainer(words, tmp_path, micro_batch=micro_batch)
        assert run.resume() == 3
        parts = [run.data.batch(3, micro_batch=micro_batch, micro_step=k)["ids"] for k in range(8 // micro_batch)]
        assert np.array_equal(np.concatenate(parts), whole.data.batch(3)["ids"])
        found = [run.step(step, 1e-3).loss for step in range(4, 9)]
        assert found == (losses[3:] if micro_batch == 4 else pytest.approx(losses[3:], rel=1e-5))


@pytest.mark.parametrize("world", [2, 4])
def test_p10_t8_another_world_reads_the_same_tokens(words, world):
    data = trainer(words, None).data
    parts = [
        data.batch(7, rank, world, micro_batch=1, micro_step=k)["ids"]
        for k in range(8 // world)
        for rank in range(world)
    ]
    assert np.array_equal(np.concatenate(parts), data.batch(7)["ids"])


@pytest.mark.parametrize("batch_tokens", [32, 64, 256, 48])
def test_p10_t8_another_batch_begins_where_the_last_one_ended(words, tmp_path, batch_tokens):
    """Twice: nothing is read again and nothing left out, over the end of an epoch too."""
    stream = trainer(words, None, batch_tokens=16, micro_batch=1).data
    at = 0
    for tokens, before, last in ((128, 0, 3), (batch_tokens, 3, 7), (128, 7, 9)):
        run = trainer(words, tmp_path, batch_tokens=tokens, micro_batch=1)
        assert run.resume() == before
        for step in range(before + 1, last + 1):
            ids = run.data.batch(step - 1)["ids"]
            assert np.array_equal(ids, np.concatenate([stream.batch(at + k)["ids"] for k in range(len(ids))]))
            at += len(ids)
            run.step(step, 1e-3)
        run.save(last)


def test_the_streak_of_skipped_updates_goes_on(words, tmp_path):
    run = trainer(words, tmp_path)
    run.step(1, 1e-3)
    run.params()["ln_f.weight"][...] = 3e38  # finite; the logits are not
    with np.errstate(invalid="ignore", over="ignore"):
        assert [run.step(step, 1e-3).skips for step in (2, 3)] == [1, 2]
        run.save(3)
        again = trainer(words, tmp_path)
        assert again.resume() == 3 and again.step(4, 1e-3).skips == 3


# while training runs --------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(words, tmp_path, monkeypatch):
    """The next update waits until the weights have been read, and not until they are on the disk."""
    may_write, may_flush = threading.Event(), threading.Event()
    write, flush = checkpoint._write_tensors, checkpoint.flush
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *args: may_write.wait() and write(*args))
    monkeypatch.setattr(checkpoint, "flush", lambda path: may_flush.wait() and flush(path))
    run = trainer(words, tmp_path)
    run.step(1, 1e-2)
    before = {name: w.copy() for name, w in run.params().items()}
    run.save(1, wait=False)
    threading.Timer(0.2, may_write.set).start()
    began = time.perf_counter()
    run.step(2, 1e-2)
    assert time.perf_counter() - began > 0.15 and checkpoint.newest(tmp_path) is None
    run.step(3, 1e-2)
    assert any((w != before[name]).any() for name, w in run.params().items())
    may_flush.set()
    run.wait_saved()
    saved = checkpoint.load(checkpoint.newest(tmp_path), {name: (w.shape, w.dtype) for name, w in before.items()})
    assert all(np.array_equal(w, before[name]) for name, w in saved.items())


def test_an_update_that_does_not_wait_spoils_the_checkpoint(words, tmp_path, monkeypatch):
    """What the test above is for."""
    monkeypatch.setattr(checkpoint.Writer, "wait_until_read", lambda self: None)
    with pytest.raises(AssertionError):
        test_training_goes_on_while_a_checkpoint_is_written(words, tmp_path, monkeypatch)


def test_what_goes_wrong_while_writing_ends_the_run_at_the_next_step(words, tmp_path):
    run = trainer(words, tmp_path / "run")
    run.step(1, 1e-3)
    (tmp_path / "run" / "step_000001").touch()  # in the way of the checkpoint's folder
    run.save(1, wait=False)
    with pytest.raises(hg.HandgradError, match="must be writable, but got Not a directory"):
        for step in range(2, 2000):
            run.step(step, 1e-3)


def test_a_log_is_on_disk_before_its_checkpoint_counts(words, tmp_path, monkeypatch):
    """A power cut leaves no checkpoint whose lines are lost: before DONE is made, they have been synced."""
    out, synced, order = tmp_path / "run", {}, []
    fsync = os.fsync

    def noted(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path == out / "log.jsonl":
            synced[path.name] = json.loads(path.read_text().splitlines()[-1])["step"]
        if path == out / "main.log":
            synced[path.name] = int(path.read_text().splitlines()[-1].split()[0][2:]) + 1
        if path.name == checkpoint.DONE and out in path.parents:
            step = int(path.parent.name[len(".step_") :][:6])
            order.append((step, synced["log.jsonl"] >= step, synced["main.log"] >= step))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    assert train(config(words, out), quiet=True) == 0
    assert order == [(4, True, True), (8, True, True), (12, True, True)]


# what cannot be resumed -----------------------------------------------------------------------------------------------


def everything(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words_", "part"),
    [
        ("--hidden-size 64", "[resume] the checkpoint's model has hidden_size 32, but got 64."),
        ("--family gpt9", "[model] a family is one of bert, gemma, gpt2, llama, gpt_neox, t5, but got 'gpt9'."),
        ("--depth 3", "[resume] the checkpoint's model has "),
        ("--preset gpt2-124m", "[resume] the checkpoint's model has "),
        ("--dropout 0", "[resume] the checkpoint's model has dropout 0.1, but got 0.0."),
        ("--dtype bf16", "[resume] the checkpoint was trained with dtype f32, but got bf16."),
        ("--steps 11", "[resume] --steps is at least the checkpoint's step 12, but got 11."),
    ],
)
def test_resume_with_other_settings(whole, tmp_path, capsys, words_, part):
    shutil.copytree(whole("f32"), tmp_path / "run")
    before = everything(tmp_path)
    assert main(["train", "--resume", str(tmp_path / "run"), *words_.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(part) and err.count("\n") == 1
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model": {}}'),
        ("step_000012/run.json", b"{"),
        ("step_000012/run.json", b'{"step": 12}'),
        ("step_000012/model.safetensors", b""),
        ("step_000012/state.rank00.safetensors", b"\xff" * 64),
    ],
)
def test_resume_from_a_damaged_folder(whole, tmp_path, capsys, name, content):
    shutil.copytree(whole("f32"), tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    before = everything(tmp_path)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("[") and err.count("\n") == 1 and Path(name).name in err
    assert everything(tmp_path) == before


def test_a_checkpoint_without_done_does_not_count(words, whole, tmp_path):
    shutil.copytree(whole("f32"), tmp_path / "run")
    (tmp_path / "run" / "step_000012" / "DONE").unlink()
    shutil.rmtree(tmp_path / "run" / "step_000008")
    assert train(config(words, tmp_path / "run", dtype="f32", resume="auto"), quiet=True) == 0
    same(tmp_path / "run", whole("f32"))


# stopped and killed ---------------------------------------------------------------------------------------------------


def start(c, code="from handgrad.cli.__main__ import main", **kwargs):
    """Starts `handgrad train` in a process of its own."""
    code += "\nimport sys; sys.exit(main(['train', *sys.argv[1:]]))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *flags(c)], **pipes | kwargs)


def after_steps(out, process, count):
    """Waits until the log has so many lines."""
    path, end = Path(out) / "log.jsonl", time.time() + 120
    while time.time() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    raise AssertionError("no step in two minutes")


LONG = dict(steps=400, save_every=50, sample_tokens=0, val_every=0, keep_last=2, dtype="f32")


@pytest.fixture(scope="module")
def long(words, tmp_path_factory):
    """A run that lasts about a second and that nothing interrupted."""
    out = tmp_path_factory.mktemp("long") / "run"
    assert train(config(words, out, **LONG), quiet=True) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_exits_with_130(words, long, tmp_path, number):
    out = tmp_path / "run"
    process = start(config(words, out, **LONG))
    after_steps(out, process, 60)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not stderr
    step = log(out)[-1]["step"]
    assert 60 <= step < 400 and (out / f"step_{step:06d}" / "DONE").exists() and (out / "report.html").exists()
    assert "stopping after this step" in stdout
    last = f"stopped after step {step}, saved in {out}\nresume: handgrad train --resume {out}\n"
    assert stdout.endswith(last)
    assert main(["train", "--resume", str(out)]) == 0
    same(out, long, 400)


def test_a_second_signal_acts_at_once(words, tmp_path):
    """A step of ten thousand micro-batches: after the first signal it goes on, after the second it is over."""
    out = tmp_path / "run"
    c = config(words, out, **LONG)
    process = start(replace(c, data=replace(c.data, batch_tokens=32 * 10_000)))
    while not (out / "memory.txt").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2)
    assert process.returncode == 130 and not list(out.glob("step_*"))


def test_killed_in_a_step(words, long, tmp_path):
    """kill -9, three times over, wherever it hits."""
    out = tmp_path / "run"
    for count in (20, 130, 260):
        process = start(config(words, out, **LONG, resume="auto"))
        after_steps(out, process, count)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert main(["train", "--resume", str(out)]) == 0
    same(out, long, 400)


KILLED_WHILE_SAVING = """
import os, signal
from handgrad.cli.__main__ import main
from handgrad.io import checkpoint

def deadly(do, calls=[]):
    def wrapped(*args):
        calls.append(do)
        if len(calls) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*args)
    return wrapped

checkpoint.flush = deadly(checkpoint.flush)
checkpoint._delete = deadly(checkpoint._delete)
"""


@pytest.mark.parametrize("count", [8, 10, 12, 13])
def test_killed_while_saving(words, whole, tmp_path, count):
    """kill -9 in the second save, calls 8 to 14: one file is written, three are, all are, the folder has its name."""
    out = tmp_path / "run"
    process = start(config(words, out, dtype="f32"), KILLED_WHILE_SAVING.format(count=count))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (out / "step_000004" / "DONE").exists() and not (out / "step_000012").exists()
    assert main(["train", "--resume", str(out)]) == 0
    same(out, whole("f32"))
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000004", "step_000008", "step_000012"]


def test_interrupted_before_the_first_step_leaves_nothing(words, tmp_path):
    out = tmp_path / "run"
    code = "import handgrad.train.resolve as resolve, signal\nfrom handgrad.cli.__main__ import main\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    code += "resolve.Trainer = lambda *_, **__: signal.raise_signal(signal.SIGINT)"
    process = start(config(words, out), code)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == "[handgrad] interrupted.\n" and not out.exists()


def test_a_live_terminal_is_left_as_it_was(words, tmp_path):
    """On a terminal: the live line, the sample, the last line; the cursor is there again."""
    import pty

    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    c = config(words, tmp_path / "run", **LONG | dict(steps=60, sample_tokens=20))
    process = start(c, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 65536):
            text += chunk
    except OSError:  # the end of a pty
        pass
    assert process.wait() == 0
    shown = text.decode()
    assert "left" in shown and "tok/s" in shown and "report.html, log.jsonl, step_000060" in shown
    assert shown.rfind("\x1b[?25h") >= shown.rfind("\x1b[?25l")


# runs of earlier versions ---------------------------------------------------------------------------------------------

EARLIER = Path(__file__).parent / "data" / "checkpoint_0.1.0"  # step 3 of the run in `earlier`
EARLIER_LOSSES = [4.123879358172417, 4.10906258225441]  # what version 0.1.0 computed in steps 4 and 5


@pytest.fixture
def earlier(tmp_path):
    """A trainer on a copy of the run folder of version 0.1.0, not yet resumed."""
    shutil.copytree(EARLIER, tmp_path / "run")
    write_shard(tmp_path / "train_0.bin", [np.random.default_rng(0).integers(0, 61, 3000)], id_dtype(61))
    data = hg.data.tokens(str(tmp_path / "train_0.bin"), seq_len=8, batch_tokens=64)
    model = hg.models.GPT2(vocab_size=61, max_seq_len=8, num_layers=1, num_heads=2, hidden_size=8)
    execution, precision = hg.Execution(micro_batch=4, backend="cpu"), hg.Precision("bf16")
    start = hg.Start(seed=5)
    return hg.Trainer(
        model, hg.optim.AdamW(), data, execution=execution, precision=precision, start=start, out=tmp_path / "run"
    )


def rounding(trainer):
    """How far the mean loss of 64 tokens may lie from that of another instruction set.

    Sums of float32 are ordered by instruction set and differ by about 2^-22 of their value, for sums of some ten terms.
    Where such a sum is rounded to bf16, units of 2^-8 apart, the rounded value changes in one case of 2^14. A step has
    64 tokens of fewer than 512 rounded values, 2^15 values in all: two change. A changed value moves the logits of a
    token by at most a unit of the largest one, |z| <= |x| |w|, and its loss by at most twice that, a 64th of which
    reaches the mean. The bound is that of 16 changes in the same direction: 8 times what is expected.
    """
    params = {name: w.astype(np.float64) for name, w in trainer.params().items()}
    x = np.sqrt(8) * np.abs(params["ln_f.weight"]).max() + np.linalg.norm(params["ln_f.bias"])
    z = x * np.linalg.norm(params["wte.weight"], axis=1).max()
    return 16 * 2 * 2**-8 * z / 64


def test_a_checkpoint_of_version_0_1_0_resumes(earlier):
    folder = earlier.out / "step_000003"
    assert "family" not in json.loads((folder / "run.json").read_text())  # of a model that could be a GPT-2 alone
    assert earlier.resume() == 3
    assert earlier.tokens(3) == 192 and list(earlier._outliers["loss"].window)[-1] == 4.125424399971962
    files = (("model.safetensors", earlier.params()), ("state.rank00.safetensors", earlier._state()))
    for name, arrays in files:
        with safe_open(folder / name, "np") as file:
            assert set(file.keys()) == set(arrays)
            for key, values in arrays.items():
                assert file.get_tensor(key).tobytes() == values.tobytes(), key
    limit = rounding(earlier)
    assert limit < 1e-3
    assert [earlier.step(step, 1e-2).loss for step in (4, 5)] == pytest.approx(EARLIER_LOSSES, rel=0, abs=limit)


def test_the_tolerance_above_tells_a_resumption_without_the_moments(earlier):
    earlier.resume()
    limit = rounding(earlier)
    for vector in ("m", "v"):
        for info in earlier.program.params.values():
            earlier.arena.write_part(vector, info.tensor, np.zeros(info.tensor.shape, np.float32))
    first, second = (earlier.step(step, 1e-2).loss for step in (4, 5))
    assert abs(first - EARLIER_LOSSES[0]) <= limit and abs(second - EARLIER_LOSSES[1]) > 3 * limit


def test_a_checkpoint_of_an_unknown_family_is_refused(earlier):
    path = earlier.out / "step_000003" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"family": "gpt9"}))
    with pytest.raises(hg.HandgradError, match=r"run.json gives a family, one of .*, but got 'gpt9'"):
        earlier.resume()


@pytest.mark.parametrize("chunks", [0, 3])
def test_settings_of_earlier_versions_do_not_stop_a_resume(words, whole, tmp_path, chunks):
    """run.head_chunks had a value, which has no effect any more: the log says so, and the weights are the same."""
    out = tmp_path / "run"
    shutil.copytree(whole("f32"), out)
    forget(out, 8)
    saved = json.loads((out / "config.json").read_text())
    for group in ("compute", "eval", "checkpoint", "log"):  # all of them stood under `run`
        saved["run"] |= saved.pop(group)
    saved["world"] = saved.pop("ranks")  # a group of another name
    del saved["model"]["family"], saved["run"]["head_mib"]
    saved["run"]["head_chunks"] = chunks
    assert saved["optim"]["cooldown_shape"] is None
    saved["optim"]["cooldown_shape"] = ""
    (out / "config.json").write_text(json.dumps(saved))
    assert main(["train", "--resume", str(out)]) == 0
    assert weights(out) == weights(whole("f32"))
    lines = log(out)
    events = [line for line in lines if "event" in line]
    text = "from here on head-chunks 3 of an earlier version has no effect"
    assert [(event["step"], event["event"]) for event in events] == ([(8, text)] if chunks else [])
    assert [line for line in lines if "event" not in line] == log(whole("f32"))
    assert "head_chunks" not in json.loads((out / "config.json").read_text())["run"]


def test_a_setting_of_no_version_stops_a_resume(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole("f32"), out)
    saved = json.loads((out / "config.json").read_text())
    saved["run"]["chunks_of_the_head"] = 3
    (out / "config.json").write_text(json.dumps(saved))
    assert main(["train", "--resume", str(out)]) == 2
    assert "chunks_of_the_head" in capsys.readouterr().err
