"""The GEMMs of a GPT-2 124M step on the CPU: handgrad against OpenBLAS and the FMA peak, interleaved.

    python bench/cpu_gemm.py                          256 and 1024 rows, about 3 minutes on 2 cores
    python bench/cpu_gemm.py --rows 256 --rounds 20

A pass runs all GEMMs in the order of a step, forward then backward: 12 times four linears and the head, each for the
output (y), the weight gradient (dw) and the input gradient (dx). Every layer has its own weights, so they come from
memory. bf16 means bf16 weights, inputs and outputs, and float32 weight gradients. Each contender is a process of its
own and sleeps while another works (two thread pools in one process slow each other down). The script drops a pass
during which other programs used more than a tenth of the machine, unless no other pass is left. The table shows
medians, and the best pass in its last row. Percentages are of the peak (bench/peak.c) measured in the same rounds.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from handgrad.backends.cpu.library import library
from handgrad.core.limits import threads as default_threads

LAYERS = 12
LINEARS = {"qkv": (2304, 768), "proj": (768, 768), "fc": (3072, 768), "fc_proj": (768, 3072)}  # (M, K)
HEAD = (50304, 768)
CONTENDERS = ("openblas fp32", "handgrad fp32", "handgrad bf16")


def products() -> list[tuple[str, str, int]]:
    """(linear, what, layer) in the order of a step."""
    forward = [(name, "y", layer) for layer in range(LAYERS) for name in LINEARS]
    backward = [(name, what, layer) for name, _, layer in reversed(forward) for what in ("dw", "dx")]
    return [*forward, *[("head", what, 0) for what in ("y", "dw", "dx")], *backward]


def shape(name: str) -> tuple[int, int]:
    return HEAD if name == "head" else LINEARS[name]


def flops(name: str, rows: int) -> int:
    return 2 * rows * shape(name)[0] * shape(name)[1]


class Tensors:
    """Operands of all GEMMs in one allocation of huge pages, like the package's arena. Every page is touched once."""

    def __init__(self, rows: int, bf16: bool):
        self.bf16 = bf16
        names = [*[(name, layer) for name in LINEARS for layer in range(LAYERS)], ("head", 0)]
        widths = {width for name in [*LINEARS, "head"] for width in shape(name)}
        weights = sum(int(np.prod(shape(name))) for name, _ in names)
        padding = 256 * 2 * (len(names) + len(widths))
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no huge pages
        self._memory = mmap.mmap(-1, 8 * (weights + rows * sum(widths)) + padding, flags=private)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0
        self.w = {key: self.real(shape(key[0]), 0.02) for key in names}
        self.dw = {key: self.array(shape(key[0]), np.float32) for key in names}
        self.x = {width: self.real((rows, width), 1.0) for width in widths}  # inputs and gradients of outputs
        self.y = {width: self.real((rows, width), 1.0) for width in widths}  # outputs and gradients of inputs

    def array(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        """Ones, aligned to 256 bytes."""
        out = np.frombuffer(self._memory, dtype, shape[0] * shape[1], self._used).reshape(shape)
        self._used += -(-out.nbytes // 256) * 256
        out[...] = 1
        return out

    def real(self, shape: tuple[int, int], scale: float) -> np.ndarray:
        """Normally distributed values, as float32 or as the bits of bf16."""
        values = np.resize(np.random.default_rng(0).normal(0, scale, 65521).astype(np.float32), shape)
        out = self.array(shape, np.uint16 if self.bf16 else np.float32)
        out[...] = values.view(np.uint32) >> 16 if self.bf16 else values
        return out


def openblas_pass(rows: int):
    """A function that runs one pass through numpy's BLAS and returns the seconds of each GEMM."""
    t = Tensors(rows, bf16=False)

    def run() -> list[float]:
        seconds = []
        for name, what, layer in products():
            (M, K), w, dw = shape(name), t.w[name, layer], t.dw[name, layer]
            begin = time.perf_counter()
            if what == "y":
                np.matmul(t.x[K], w.T, out=t.y[M])
            elif what == "dw":
                np.matmul(t.x[M].T, t.x[K], out=dw)
            else:
                np.matmul(t.x[M], w, out=t.y[K])
            seconds.append(time.perf_counter() - begin)
        return seconds

    return run


def handgrad_pass(rows: int, bf16: bool):
    """The same with handgrad's kernels, bound like a program's calls: one list of entries, one library call a pass."""
    lib, threads, dtype = library(), default_threads(), "bf16" if bf16 else "f32"
    lib.set_threads(threads)
    t = Tensors(rows, bf16)
    nbytes = max(lib.scratch("linear_scratch", dtype, [rows, *shape(name), threads]) for name in [*LINEARS, "head"])
    scratch = np.empty(nbytes + 64, np.uint8)
    scalars = np.zeros(64, np.uint8)
    at = {"scratch": -(-scratch.ctypes.data // 64) * 64, "scalars": scalars.ctypes.data}
    blocks, entries = [], []
    for name, what, layer in products():
        (M, K), w, dw = shape(name), t.w[name, layer].ctypes.data, t.dw[name, layer].ctypes.data
        x, dy, y, dx = (array.ctypes.data for array in (t.x[K], t.x[M], t.y[M], t.y[K]))
        if what == "y":
            entry, args = "linear_forward", [y, 0, x, w, 0, rows, M, K, 0, threads, at["scratch"]]
        elif what == "dw":
            entry, args = "linear_backward_w", [dw, 0, dy, x, rows, M, K, 0, 0, threads, at["scalars"], at["scratch"]]
        else:
            entry, args = "linear_backward_x", [dx, dy, w, rows, M, K, threads, at["scratch"]]
        blocks.append(np.array(args, np.int64))
        entries += [lib.entry(entry, dtype), blocks[-1].ctypes.data]
    calls = np.array(entries, np.int64)

    def run() -> list[float]:
        seconds = np.zeros(len(blocks))
        lib.run_timed(calls.ctypes.data, len(blocks), seconds.ctypes.data)
        return seconds.tolist()

    run.keep = (t, scratch, scalars, blocks, calls)
    return run


def work(contender: str, rows: int) -> None:
    """The worker process: for every line of standard input, runs one pass and prints its seconds as JSON."""
    run = openblas_pass(rows) if "openblas" in contender else handgrad_pass(rows, "bf16" in contender)
    run()
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


def busy_seconds() -> float:
    """Core-seconds of work that the whole machine has done since boot."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Worker:
    """One contender's process, with its clean and its disturbed passes (seconds of each GEMM)."""

    def __init__(self, contender: str, rows: int, environment: dict[str, str]):
        command = [sys.executable, __file__, "--worker", contender, "--rows", str(rows)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.clean: list[list[float]] = []
        self.disturbed: list[list[float]] = []

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def round(self, cores: int) -> None:
        time.sleep(0.2)  # the previous worker's threads still spin for some 30 ms
        begin, busy, own = time.perf_counter(), busy_seconds(), self.cpu_seconds()
        self.process.stdin.write("pass\n")
        self.process.stdin.flush()
        seconds = json.loads(self.process.stdout.readline())
        foreign = busy_seconds() - busy - (self.cpu_seconds() - own)
        kept = self.clean if foreign < 0.1 * cores * (time.perf_counter() - begin) else self.disturbed
        kept.append(seconds)

    @property
    def passes(self) -> list[list[float]]:
        return self.clean or self.disturbed


def report(rows: int, workers: dict[str, Worker], peaks: list[list[float]]) -> None:
    """Prints the table for one number of rows."""
    order = products()
    peak = {kind: statistics.median(p[i] for p in peaks) for i, kind in enumerate(("fp32", "bf16"))}
    print(f"\n{rows} rows; peak {peak['fp32']:.0f} GFLOP/s fp32, {peak['bf16']:.0f} bf16; ms (% of peak)")
    print(f"{'':14}" + "".join(f"{c:>22}" for c in workers))
    for name in [*LINEARS, "head"]:
        for what in ("y", "dw", "dx"):
            picked = [i for i, call in enumerate(order) if call[:2] == (name, what)]
            cells = []
            for contender, worker in workers.items():
                ms = 1e3 * statistics.median(sum(p[i] for i in picked) for p in worker.passes)
                percent = flops(name, rows) * len(picked) / ms / 1e4 / peak[contender[-4:]]
                cells.append(f"{ms:14.1f} ({percent:4.1f})")
            print(f"{name:8}{what:6}" + "".join(f"{cell:>22}" for cell in cells))
    total = sum(flops(name, rows) for name, _, _ in order)
    for label, pick in (("median", statistics.median), ("best", min)):
        cells = []
        for contender, worker in workers.items():
            ms = 1e3 * pick(sum(p) for p in worker.passes)
            cells.append(f"{ms:14.1f} ({total / ms / 1e4 / peak[contender[-4:]]:4.1f})")
        print(f"{'all':8}{label:6}" + "".join(f"{cell:>22}" for cell in cells))
    counts = [f"{len(w.clean)} of {len(w.clean) + len(w.disturbed)}" for w in workers.values()]
    print(f"{'undisturbed':14}" + "".join(f"{count:>22}" for count in counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.rows[0])
        return
    threads = str(default_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    print(f"{threads} threads, isa {library().isa}, numpy's BLAS: {blas['name']} {blas['version']}")
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/peak"
        cc = os.environ.get("CC", "cc")
        subprocess.run([cc, "-O2", "-fopenmp", str(Path(__file__).parent / "peak.c"), "-o", binary], check=True)
        for rows in args.rows:
            workers = {contender: Worker(contender, rows, environment) for contender in CONTENDERS}
            peaks = []
            for worker in workers.values():
                worker.round(int(threads))  # warm-up
                worker.clean, worker.disturbed = [], []
            for _ in range(args.rounds):
                peak = subprocess.run([binary], check=True, capture_output=True, text=True, env=environment).stdout
                peaks.append([float(v) for v in peak.split()])
                for worker in workers.values():
                    worker.round(int(threads))
            report(rows, workers, peaks)
            for worker in workers.values():
                worker.process.stdin.close()
                worker.process.wait()


if __name__ == "__main__":
    main()
