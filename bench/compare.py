"""Whole training steps of two checkouts in turn on one machine: did a change cost speed?

    python bench/compare.py ../before . --models 124m 350m 774m 1558m      GPU, bf16; 6 minutes
    python bench/compare.py ../before . --cpu 4x64 4x256                   CPU, float32; 5 minutes on 2 cores

Both checkouts need their compiled kernels. Each side is a process of its own, made by its own bench/gpu_step.py or
bench/cpu_step.py; a round runs both in turn, in alternating order. The script reports medians over the rounds, the
median of the ratios of rounds, and on a GPU the time to the first step with an empty cache, and with a full one.
"""

import argparse
import datetime
import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Side:
    """One checkout's process."""

    def __init__(self, tree: Path, script: str, words: list[str], cache: Path):
        environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
        self._begin = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(tree / "bench" / script), "--worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"HANDGRAD_CACHE": str(cache)},
        )

    def read(self) -> dict:
        """The next line of JSON that the process prints."""
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process ended with exit code {self._process.wait()}")

    def ask(self, command: str) -> dict:
        """The answer to a command."""
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.read()

    def first_step(self) -> float:
        """Seconds from the start of the process to the end of its first step."""
        self.read()
        return time.perf_counter() - self._begin

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def in_turn(sides: list[Side], command: str, rounds: int) -> list[list[float]]:
    """Milliseconds of a step by side and round; every second round runs the sides in the other order."""
    times: list[list[float]] = [[] for _ in sides]
    for k in range(rounds):
        order = range(len(sides)) if k % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            times[i].append(sides[i].ask(command)["ms"])
    return times


def gpu(trees: list[Path], name: str, rounds: int, folder: Path) -> tuple[list[list[float]], str]:
    """(times, a note on start-up) of one model on a GPU."""
    bench = runpy.run_path(str(trees[1] / "bench" / "gpu_step.py"))
    shard = folder / f"{name}.bin"
    bench["write_random"](shard, 2 * bench["TASKS"][name].step_tokens + 1)
    words = ["handgrad", name, str(shard), "cuda", "{}"]
    caches = [folder / "before", folder / "after"]
    sides, cold = [], []
    for tree, cache in zip(trees, caches):  # one after the other: autotuning needs the GPU to itself
        sides.append(Side(tree, "gpu_step.py", words, cache))
        cold.append(sides[-1].first_step())
        sides[-1].ask("steps 2")
    times = in_turn(sides, f"steps {bench['TASKS'][name].rounds_of}", rounds)
    for side in sides:
        side.close()
    warm: list[list[float]] = [[], []]
    for _ in range(3):
        for i, (tree, cache) in enumerate(zip(trees, caches)):
            side = Side(tree, "gpu_step.py", words, cache)
            warm[i].append(side.first_step())
            side.close()
    a, b = (statistics.median(seconds) for seconds in warm)
    return times, f"first step {cold[0]:.1f}, {cold[1]:.1f} s; cache full {a:.2f}, {b:.2f} s"


def cpu(trees: list[Path], shape: str, rounds: int, folder: Path) -> tuple[list[list[float]], str]:
    """(times, "") of GPT-2 124M at micro-batch x sequence length on the CPU."""
    sides = [Side(tree, "cpu_step.py", ["handgrad-f32", shape], folder) for tree in trees]
    for side in sides:
        side.ask("step")
    times = in_turn(sides, "step", rounds)
    for side in sides:
        side.close()
    return times, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, help="the checkouts before and after")
    parser.add_argument("--models", nargs="*", default=[], help="sizes of bench/gpu_step.py")
    parser.add_argument("--cpu", nargs="*", default=[], help="shapes of bench/cpu_step.py")
    parser.add_argument("--rounds", type=int, default=6)
    a = parser.parse_args()
    trees = [tree.resolve() for tree in a.trees]
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {a.rounds} rounds, ms a step")
    print(f"{'':14} {'before':>9} {'after':>9} {'after / before':>15}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for measure, name in [(gpu, m) for m in a.models] + [(cpu, s) for s in a.cpu]:
            times, note = measure(trees, name, a.rounds, Path(folder))
            before, after = (statistics.median(t) for t in times)
            ratios.append(statistics.median(y / x for x, y in zip(*times)))
            print(f"{name:14} {before:9.1f} {after:9.1f} {ratios[-1]:15.4f}  {note}", flush=True)
    print(f"{'mean ratio':14} {'':9} {'':9} {statistics.fmean(ratios):15.4f}")


if __name__ == "__main__":
    main()
