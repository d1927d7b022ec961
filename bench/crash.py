"""kill -9 at random instants: does every resumed run end bit-identical to an uninterrupted one?

    python bench/crash.py --out bench/results/crash.txt     fifty kills, three minutes

A small run writes a checkpoint every 3 steps while it trains. The script starts it with `--resume auto`, kills it
at a random instant of its steps, and starts it again with the same command. Then it compares the result with that of
an uninterrupted run: weights, optimizer state and everything else in a checkpoint, log.jsonl except for the times, and
main.log. "lost" counts the steps that the killed process had logged after the newest complete checkpoint; the resumed
run repeats them. Up to six can be lost: three since the last checkpoint began, and three while it was being written.
"""

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from handgrad import io
from handgrad.data import id_dtype, write_shard

EVERY = 3
TIMES = ("seconds", "tokens_per_second")
FLAGS = (
    "--num-layers 2 --num-heads 2 --hidden-size 64 --max-seq-len 32 --dropout 0.1 "
    "--micro-batch 2 --batch-tokens 128 --threads 1 --val-every 5 --val-tokens 64 "
    f"--sample-tokens 0 --save-every {EVERY} --keep-last 2 --warmup 10 --resume auto"
)


def start(folder: Path, out: Path, steps: int) -> subprocess.Popen:
    """`handgrad train` in a process of its own."""
    words = f"{FLAGS} --steps {steps} --train {folder / 'data'} --out {out}".split()
    code = "import sys; from handgrad.cli.__main__ import main; sys.exit(main(['train', *sys.argv[1:]]))"
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    """Waits for the process; exits if it failed."""
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}: {stderr.decode()}")


def logged(out: Path) -> list[dict]:
    """The complete lines of the log, without the times."""
    path = out / "log.jsonl"
    rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if key not in TIMES} for row in rows]


def end(out: Path, steps: int) -> dict[str, object]:
    """Everything in a finished run's folder that must not depend on how often the run was killed."""
    folder = out / f"step_{steps:06d}"
    meta = {key: value for key, value in io.load_meta(folder).items() if key != "config"}  # the config names the folder
    files = {path.name: path.read_bytes() for path in (*folder.glob("*.safetensors"), out / "main.log")}
    return {"log.jsonl": logged(out), "run.json": meta} | files


def main() -> int:
    """Prints a line for each kill; returns 0 if every run ends with the same result."""
    parser = argparse.ArgumentParser()
    for name, default in (("--kills", 50), ("--steps", 150), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="also write the output to this file")
    a = parser.parse_args()
    folder = a.folder or Path(tempfile.mkdtemp())
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 20_000), ("val", 500)):
        ids = np.cumsum(np.random.default_rng(0).integers(0, 3, count)) % 97
        write_shard(folder / "data" / f"{split}_0.bin", [ids], id_dtype(97))
    lines = [f"date {datetime.date.today()}, {a.kills} kills of a run of {a.steps} steps, a checkpoint every {EVERY}"]

    process, begin, began = start(folder, folder / "whole", a.steps), 0.0, False
    while process.poll() is None:
        if not began and logged(folder / "whole"):
            begin, began = time.perf_counter(), True
        time.sleep(0.001)
    finish(process)
    seconds = time.perf_counter() - begin
    whole, rng, same = end(folder / "whole", a.steps), random.Random(a.seed), 0
    lines.append(f"the uninterrupted run takes {seconds:.2f} s from its first step")
    print("\n".join(lines), flush=True)

    for kill in range(1, a.kills + 1):
        out, moment = folder / f"killed_{kill:02d}", rng.uniform(1, a.steps - EVERY)  # in steps: clocks change
        process = start(folder, out, a.steps)
        while process.poll() is None and len(logged(out)) < int(moment):
            time.sleep(0.001)
        time.sleep(moment % 1 * seconds / a.steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        last = max((line["step"] for line in logged(out)), default=0)
        newest = io.newest(out)
        saved = int(newest.name[5:]) if newest else 0
        debris = sum(".tmp-" in name or name.endswith(".old") for name in os.listdir(out))
        finish(start(folder, out, a.steps))
        found = end(out, a.steps)
        wrong = [name for name in whole if found.get(name) != whole[name]]
        wrong += [f"{last - saved} steps lost"] if last - saved > 2 * EVERY else []
        same += not wrong
        lines.append(
            f"kill {kill:2}: at {moment:6.2f} steps, step {last:3} logged, {saved:3} saved, {last - saved} lost, "
            + ("during a save, " if debris else "")
            + (f"differs: {', '.join(wrong)}" if wrong else "same result")
        )
        print(lines[-1], flush=True)
    lines.append(f"bit for bit: {same} of {a.kills}")
    print(lines[-1])
    if a.out:
        a.out.write_text("\n".join(lines) + "\n")
    return 0 if same == a.kills else 1


if __name__ == "__main__":
    sys.exit(main())
