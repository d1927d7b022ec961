"""Whole training steps of GPT-2 124M or SmolLM2 135M on the CPU, handgrad against PyTorch, in one interleaved run.

    python bench/cpu_step.py                       all shapes and contenders, about 25 minutes on 2 cores
    python bench/cpu_step.py --shapes 4x64 --rounds 5 --only handgrad-bf16 torch-bf16
    python bench/cpu_step.py --model smollm2-135m --shapes 4x256

A step is forward, backward, gradient clipping and AdamW on one batch of random tokens. Every contender is a
process of its own (two OpenMP pools in one process slow each other down) and waits while another runs. Each round runs
all contenders in turn, so a slow minute of the machine hits all of them. The script reports the median ms a step over
the rounds, tok/s, ratios of medians, peak RSS, and for handgrad the planned arena and the ms of each op.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTENDERS = ("handgrad-f32", "handgrad-bf16", "torch-f32", "torch-f32-compiled", "torch-bf16", "torch-bf16-compiled")
GEMM_OPS = ("linear", "linear_backward_w", "linear_backward_x", "lm_loss_forward_backward")
MODELS = ("gpt2-124m", "smollm2-135m")
WARMUP = 2


def handgrad_worker(preset: str, dtype: str, B: int, T: int):
    """(step function, facts after the run)."""
    import tempfile

    import numpy as np

    import handgrad as hg
    from handgrad.data import id_dtype, write_shard

    folder, model = tempfile.mkdtemp(), hg.models.preset(preset)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, 64 * B * T + 1)
    write_shard(f"{folder}/train_0.bin", [ids], id_dtype(model.vocab_size))
    data = hg.data.tokens(f"{folder}/*.bin", seq_len=T, batch_tokens=B * T)
    kind = dict(execution=hg.Execution(B, extra_programs=(), backend="cpu"), precision=hg.Precision(dtype))
    run = hg.Trainer(model, hg.optim.AdamW(), data, **kind)
    steps = iter(range(1, 1 << 30))

    def step() -> float:
        return run.step(next(steps), 1e-4).loss

    def facts() -> dict:
        seconds: dict[str, float] = {}

        def after(call, s):
            seconds[call.op.name] = seconds.get(call.op.name, 0.0) + s

        run.trace(after)
        return {"arena": run.plan.nbytes, "isa": run.backend.isa, "ops_ms": {k: 1e3 * v for k, v in seconds.items()}}

    return step, facts


def torch_worker(preset: str, dtype: str, compiled: bool, B: int, T: int):
    """(step function, facts after the run)."""
    sys.path.insert(0, str(ROOT / "reference"))
    import numpy as np
    import torch
    from gpt2_torch import GPT2, adamw, train_step
    from llama_torch import Llama

    torch.manual_seed(0)
    bf16 = dtype == "bf16"
    model = GPT2(50257, 1024, 12, 12, 768, bf16=bf16) if preset == MODELS[0] else Llama(preset, T, bf16=bf16)
    if compiled:
        model.compile()
    optimizer = adamw(model, 1e-4, (0.9, 0.95), 1e-8, 0.1)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, len(model.wte.weight), (B, T + 1)))

    def step() -> float:
        return float(train_step(model, optimizer, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1.0)[0])

    return step, lambda: {"torch": torch.__version__}


def worker(preset: str, name: str, B: int, T: int) -> None:
    """The worker process: reads 'step' or 'facts' from standard input and answers with a line of JSON."""
    kind, dtype, *compiled = name.split("-")
    if kind == "handgrad":
        step, facts = handgrad_worker(preset, dtype, B, T)
    else:
        step, facts = torch_worker(preset, dtype, bool(compiled), B, T)
    for command in sys.stdin:
        if command.strip() == "step":
            begin = time.perf_counter()
            loss = step()
            answer = {"ms": 1e3 * (time.perf_counter() - begin), "loss": loss}
        else:
            hwm = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
            answer = {"rss": int(hwm.split()[1]) * 1024}
            answer |= facts()
        print(json.dumps(answer), flush=True)


class Process:
    """A contender's process."""

    def __init__(self, preset: str, name: str, B: int, T: int):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--model", preset, "--worker", name, f"{B}x{T}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads())},
        )

    def ask(self, command: str) -> dict:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"[bench] contender {self.name} died")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """Core-seconds that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def threads() -> int:
    return len(os.sched_getaffinity(0))


def busy_seconds() -> float:
    """Core-seconds of work that the whole machine has done since boot."""
    user, nice, system = (int(v) for v in open("/proc/stat").readline().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def race(preset: str, names: list[str], B: int, T: int, rounds: int) -> dict:
    """Results by contender for one shape, and the share of the machine that other programs used meanwhile."""
    processes = [Process(preset, name, B, T) for name in names]
    losses = {p.name: p.ask("step")["loss"] for p in processes}
    for _ in range(WARMUP - 1):
        for p in processes:
            p.ask("step")
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, others = time.perf_counter(), busy_seconds() - sum(p.cpu_seconds() for p in processes)
    for _ in range(rounds):
        for p in processes:
            times[p.name].append(p.ask("step")["ms"])
    elapsed = time.perf_counter() - begin
    foreign = (busy_seconds() - sum(p.cpu_seconds() for p in processes) - others) / (threads() * elapsed)
    results = {
        p.name: {
            "median_ms": statistics.median(times[p.name]),
            "best_ms": min(times[p.name]),
            "all_ms": times[p.name],
            "tokens_per_second": B * T / statistics.median(times[p.name]) * 1e3,
            "loss": losses[p.name],
        }
        | p.ask("facts")
        for p in processes
    }
    for p in processes:
        p.close()
    return results | {"foreign": foreign}


def show(preset: str, shape: str, results: dict) -> None:
    foreign = results.pop("foreign")
    print(
        f"\n{preset}, B x T = {shape}, {threads()} threads (other programs used {100 * foreign:.0f} % of the machine)"
    )
    print(f"{'':22}{'median ms':>10}{'best ms':>9}{'tok/s':>8}{'peak RSS MiB':>14}{'arena MiB':>11}")
    for name, r in results.items():
        arena = f"{r['arena'] / 2**20:11.0f}" if "arena" in r else ""
        print(
            f"{name:22}{r['median_ms']:10.0f}{r['best_ms']:9.0f}{r['tokens_per_second']:8.0f}"
            f"{r['rss'] / 2**20:14.0f}{arena}"
        )
    for dtype in ("f32", "bf16"):
        mine, theirs = (
            results.get(f"handgrad-{dtype}"),
            [r for n, r in results.items() if n.startswith(f"torch-{dtype}")],
        )
        if mine and theirs:
            best = min(r["median_ms"] for r in theirs)
            print(
                f"{dtype} ({mine['isa']}): {best / mine['median_ms']:.2f}x the faster PyTorch; "
                f"RSS {mine['rss'] / min(r['rss'] for r in theirs):.3f} of PyTorch's smallest, "
                f"arena + {(mine['rss'] - mine['arena']) / 1e6:.0f} MB"
            )
        if mine:
            total = sum(mine["ops_ms"].values())
            rest = total - sum(mine["ops_ms"].get(op, 0.0) for op in GEMM_OPS)
            ops = "  ".join(f"{op} {ms:.0f}" for op, ms in sorted(mine["ops_ms"].items(), key=lambda kv: -kv[1]))
            print(f"{dtype}: not GEMM {100 * rest / total:.1f} % of the step; ms by op: {ops}")
    if {"handgrad-f32", "handgrad-bf16"} <= set(results):
        print(
            f"bf16 is {results['handgrad-f32']['median_ms'] / results['handgrad-bf16']['median_ms']:.2f}x our own f32"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--shapes", nargs="+", default=["4x64", "4x256", "1x1024"], help="batch x sequence length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a.model, a.worker[0], *(int(n) for n in a.worker[1].split("x")))
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    facts = {"cpu": cpu, "threads": threads(), "date": datetime.date.today().isoformat(), "commit": commit}
    print("  ".join(f"{k} {v}" for k, v in facts.items()))
    shapes = {}
    for shape in a.shapes:
        shapes[shape] = race(a.model, a.only, *(int(n) for n in shape.split("x")), a.rounds)
        show(a.model, shape, dict(shapes[shape]))
    if a.json:
        a.json.write_text(json.dumps(facts | {"model": a.model, "shapes": shapes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
