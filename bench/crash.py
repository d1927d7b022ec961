"""kill -9 at random instants: does every run that goes on end bit for bit like the one that nothing stopped?

    python bench/crash.py --out bench/results/crash.txt     fifty kills, three minutes

A small run checkpoints every 3 steps, beside training. It is started with `--run.resume auto`, killed at a random
instant of its steps, and started again with the same words. Its end is compared with that of a run that nothing
stopped: weights, optimizer state and what else a checkpoint holds, log.jsonl but for the times, main.log.
"lost": steps that the dead process had logged after the newest complete checkpoint, and that are done again. Three
may have passed since the last checkpoint was begun, and three while it was being written.
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
    "--model.num-layers 2 --model.num-heads 2 --model.hidden-size 64 --model.max-seq-len 32 --model.dropout 0.1 "
    "--run.micro-batch 2 --data.batch-tokens 128 --run.threads 1 --run.val-every 5 --run.val-tokens 64 "
    f"--run.sample-tokens 0 --run.save-every {EVERY} --run.keep-last 2 --optim.warmup 10 --run.resume auto"
)


def start(folder: Path, out: Path, steps: int) -> subprocess.Popen:
    """`handgrad train` in a process of its own."""
    words = f"{FLAGS} --run.steps {steps} --data.train {folder / 'data'} --run.out {out}".split()
    code = "import sys; from handgrad.cli.__main__ import main; sys.exit(main(['train', *sys.argv[1:]]))"
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    """Waits for its end, which must be a good one."""
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}: {stderr.decode()}")


def logged(out: Path) -> list[dict]:
    """The whole lines of the log, without the times."""
    path = out / "log.jsonl"
    rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if key not in TIMES} for row in rows]


def end(out: Path, steps: int) -> dict[str, object]:
    """Everything that a finished run leaves and that must not depend on how often it was stopped."""
    folder = out / f"step_{steps:06d}"
    meta = {key: value for key, value in io.load_meta(folder).items() if key != "config"}  # which names the folder
    files = {path.name: path.read_bytes() for path in (*folder.glob("*.safetensors"), out / "main.log")}
    return {"log.jsonl": logged(out), "run.json": meta} | files


def main() -> int:
    """Prints a line for each kill; returns 0 if every end is the same."""
    parser = argparse.ArgumentParser()
    for name, default in (("--kills", 50), ("--steps", 150), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary one if not given")
    parser.add_argument("--out", type=Path, help="also write the lines there")
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
    lines.append(f"the run that nothing stops takes {seconds:.2f} s from its first step")
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
            + ("within a save, " if debris else "")
            + (f"differs: {', '.join(wrong)}" if wrong else "the same end")
        )
        print(lines[-1], flush=True)
    lines.append(f"bit for bit: {same} of {a.kills}")
    print(lines[-1])
    if a.out:
        a.out.write_text("\n".join(lines) + "\n")
    return 0 if same == a.kills else 1


if __name__ == "__main__":
    sys.exit(main())
