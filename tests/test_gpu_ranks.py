"""Ranks on GPUs of one machine, as `handgrad train --gpus` starts them: they train as one, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from handgrad.backends import why_no_cuda
from handgrad.data import prepare_text
from handgrad.tokenizers import chars

pytestmark = pytest.mark.gpu
FLAGS = (
    "--preset tiny --backend cuda --batch-tokens 1024 --no-shuffle --sample-tokens 16 --val-every 10 --train text "
    "--schedule constant --warmup 0"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a folder of tokens."""
    if not why_no_cuda():
        from handgrad.backends.cuda.driver import find_gpus

        if len(find_gpus()) < 2:
            pytest.skip("needs two GPUs")
    monkeypatch.chdir(tmp_path)
    words = "".join(np.random.default_rng(2).choice(list("abcdefgh \n"), 60_000).tolist())
    Path("words.txt").write_text(words)
    prepare_text([Path("words.txt")], "text", chars(words))
    return tmp_path


def start(flags, out="run", gpus=2):
    command = [sys.executable, "-m", "handgrad.cli", "train", *FLAGS.split(), *flags.split(), "--out", out]
    command += ["--gpus", str(gpus)] if gpus > 1 else []
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0, seconds=60):
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def log(out="run"):
    return [row for row in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "loss" in row]


def test_two_gpus_train_as_one_and_resume_on_one(here):
    """In float32, where only the order of sums differs: by 2^-21 of a gradient, as in tests/test_distributed.py."""
    finish(start("--steps 20 --micro-batch 4 --dtype f32", "one", 1))
    finish(start("--steps 10 --micro-batch 4 --dtype f32 --zero 3", "run"))
    finish(start("--steps 15 --micro-batch 4 --dtype f32 --zero 1 --resume run", "run", 1))
    finish(start("--steps 20 --micro-batch 4 --dtype f32 --zero 2 --resume run", "run"))
    params, moved = json.loads(Path("one/run.json").read_text())["summary"]["params"], 0.0
    assert [row["step"] for row in log()] == list(range(1, 21))
    for row, other in zip(log("one"), log()):
        bound = row["grad_norm"] * params**0.5 * moved + 2.0**-20 * row["loss"]
        assert abs(row["loss"] - other["loss"]) <= bound
        moved += max(row["lr"], other["lr"]) * 2.0**-21


def started(process):
    """The process of rank 1, once it has made some steps."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1/"):
            break
    number = re.search(r"1 is process (\d+)", "".join(lines))
    assert number, lines
    time.sleep(2.0)
    return int(number[1])


@pytest.mark.parametrize("sent, limit", [(signal.SIGKILL, 15), (signal.SIGSTOP, 30)])
def test_rank_that_is_gone_ends_all(here, sent, limit):
    process = start("--steps 1000000 --micro-batch 4 --save-every 0")
    number, begin = started(process), time.monotonic()
    os.kill(number, sent)
    told = finish(process, 1)
    taken = time.monotonic() - begin
    assert "[rank 1] its process was ended by signal 9" in told or "[rank 1] it has not answered" in told
    assert taken < limit and not Path(f"/proc/{number}").exists(), taken


def test_signal_to_one_rank_stops_all_with_a_checkpoint(here):
    process = start("--steps 1000000 --micro-batch 4 --save-every 0")
    os.kill(started(process), signal.SIGINT)
    last = int(re.search(r"stopped after step (\d+), saved in run", finish(process, 130))[1])
    assert Path(f"run/step_{last:06d}/DONE").exists() and log()[-1]["step"] == last
