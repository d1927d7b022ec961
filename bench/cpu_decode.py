"""Tokens a second of one sequence on the CPU, handgrad against llama.cpp on the same files, in one interleaved run.

    pip install '.[gguf]'
    python bench/cpu_decode.py MODEL.gguf --llama-bench llama.cpp/build/bin/llama-bench

MODEL.gguf is converted to a file of each type: F32 and BF16, which both programs read; F16 and Q8_0, which llama.cpp
computes with and handgrad unpacks to float32, are here for comparison. A measurement decodes TOKENS tokens, one after
the other, from an empty cache and without sampling, as llama-bench does. Each round runs all contenders in turn, each
in a process of its own that waits while another runs. llama.cpp rounds to BF16 what it multiplies by BF16, as handgrad
does, and holds keys and values in float16.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu_step import ROOT, busy_seconds, threads

CONTENDERS = ("handgrad-f32", "handgrad-bf16", "llama.cpp-f32", "llama.cpp-bf16", "llama.cpp-f16", "llama.cpp-q8_0")
TOKENS = 64


def worker(file: str) -> None:
    """The process of handgrad: answers every line of standard input with the tokens a second of a run."""
    from handgrad.infer.load import load_run

    engine, _ = load_run(file, Path(file).stem, context=256)
    for token in sys.stdin:
        engine.position, begin = 0, time.perf_counter()
        for _ in range(TOKENS):
            engine.logits([int(token)])
        print(TOKENS / (time.perf_counter() - begin), flush=True)


class Handgrad:
    """A model in a process of its own."""

    def __init__(self, file: Path):
        words = [sys.executable, __file__, str(file), "--worker"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.measure()  # starts the threads, touches the weights

    def measure(self) -> float:
        self._process.stdin.write("42\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class LlamaCpp:
    """llama-bench, which warms up and measures once."""

    def __init__(self, program: Path, file: Path):
        self._words = [program, "-m", file, "-t", str(threads()), "-p", "0", "-n", str(TOKENS), "-r", "1", "-o", "json"]

    def measure(self) -> float:
        done = subprocess.run([str(word) for word in self._words], capture_output=True, text=True, check=True)
        (self.facts,) = json.loads(done.stdout)
        return self.facts["avg_ts"]

    def close(self) -> None:
        pass


def show(found: dict[str, list[float]], sizes: dict[str, int]) -> None:
    print(f"\n{'':18}{'median tok/s':>13}{'best':>8}{'file MiB':>10}{'GB/s of the file':>18}")
    for name, speeds in found.items():
        median, size = statistics.median(speeds), sizes[name.split("-")[1]]
        print(f"{name:18}{median:13.1f}{max(speeds):8.1f}{size / 2**20:10.0f}{median * size / 1e9:18.1f}")
    for kind in ("f32", "bf16"):
        mine, theirs = (statistics.median(found.get(f"{who}-{kind}", [0.0])) for who in ("handgrad", "llama.cpp"))
        if mine and theirs:
            print(f"{kind}: {mine / theirs:.2f}x llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's benchmark; without it handgrad runs alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(str(a.model))
    import handgrad
    from handgrad.backends import open_backend
    from handgrad.cli.__main__ import main as run

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(f"handgrad {handgrad.__version__} {commit.stdout.strip()} ({open_backend('cpu').isa})", end="  ")
    print(f"threads {threads()}  date {datetime.date.today()}  {TOKENS} tokens, median of {a.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder, f"{kind}.gguf") for kind in ("f32", "bf16", "f16", "q8_0")}
        for kind, file in files.items():
            run(["convert", str(a.model), str(file), "--dtype", kind])
        names = [name for name in CONTENDERS if a.llama_bench or name.startswith("handgrad")]
        contenders = {}
        for name in names:
            who, kind = name.split("-")
            contenders[name] = Handgrad(files[kind]) if who == "handgrad" else LlamaCpp(a.llama_bench, files[kind])
        found: dict[str, list[float]] = {name: [] for name in names}
        begin, busy = time.perf_counter(), busy_seconds()
        for _ in range(a.rounds):
            for name, contender in contenders.items():
                found[name].append(contender.measure())
        seconds = time.perf_counter() - begin
        for contender in contenders.values():
            contender.close()
        show(found, {kind: file.stat().st_size for kind, file in files.items()})
        if a.llama_bench:
            about = next(c.facts for c in contenders.values() if isinstance(c, LlamaCpp))
            print(f"llama.cpp build {about['build_commit']} ({about['build_number']}), {about['cpu_info']}")
    print(f"all programs kept {(busy_seconds() - busy) / seconds:.1f} of {threads()} cores busy")


if __name__ == "__main__":
    main()
