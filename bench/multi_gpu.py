"""GPT-2 on several GPUs of one machine: correctness, then speed and memory by number of ranks and ZeRO stage, with
PyTorch's DistributedDataParallel.

    python bench/multi_gpu.py                         W = 1, 2, 4, ... up to the GPUs here; at most 9 minutes
    python bench/multi_gpu.py --worlds 1 2 --models 124m --no-torch
    python bench/multi_gpu.py --smoke --worlds 1 2    tiny models on CPU ranks, to test this script

Correctness: losses of 20 steps of a small model on W ranks with ZeRO 0 to 3 against one rank with the same global
batch; the same run twice, bit for bit; a run that is saved and resumed on 1 and on W ranks.

Speed: median ms of a step over rounds, tok/s, MFU by llm.c's formula, device memory of a rank, the milliseconds of a
step in which computation waits for other ranks ("exposed"), and the step of the slowest rank with every collective left
out, measured in turn with whole steps ("alone"). "no overlap": a collective ends before the next call starts. Every
contender is a set of processes, one a GPU; one GPU is measured before and after all others.
"""

import argparse
import datetime
import gc
import hashlib
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
from gpu_step import HEADER_BYTES, TASKS, VOCAB, Task  # noqa: E402

TINY = Task("d2", 2, 2, 128, 1, 32, 512, 1, 1)
SMALL = {"vocab_size": 512, "max_seq_len": 128, "num_layers": 3, "num_heads": 4, "hidden_size": 128}
SEQUENCES, STEPS = 16, 20  # of a step of the small model, which 1, 2, 4 and 8 ranks divide
RESULT = "RESULT "
Result = dict


# workers -------------------------------------------------------------------------------------------------------------


def task_of(job: dict) -> Task:
    return TINY if job["model"] == "tiny" else TASKS[job["model"]]


def losses(job: dict) -> Result:
    """Steps of a small model: losses, norms, and a hash of the weights."""
    import handgrad as hg

    world = int(os.environ["WORLD_SIZE"])
    data = hg.data.tokens(job["small"], 128, 128 * SEQUENCES, shuffle=False)
    execution = hg.Execution(SEQUENCES // world // 2, backend=job["backend"], zero=job["zero"], extra_programs=("val",))
    model, precision = hg.models.GPT2(**SMALL), hg.Precision(job["dtype"])
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, precision=precision, out=job.get("out"))
    run.keeps_journal = False
    first = run.resume() + 1 if job.get("out") else 1
    done = [run.step(step, 1e-3) for step in range(first, job["last"] + 1)]
    if job.get("out"):
        run.save(job["last"])
    found = {"losses": [s.loss for s in done], "norms": [s.grad_norm for s in done], "val": run.evaluate(data, 2560)}
    weights = run.params()
    text = b"".join(weights[name].tobytes() for name in sorted(weights))
    return found | {"weights": hashlib.sha256(text).hexdigest()}


def speed(job: dict) -> Result:
    """Whole steps of a model, and the same without collectives, in turn."""
    import handgrad as hg
    from handgrad.ops import collectives

    task, world = task_of(job), int(os.environ["WORLD_SIZE"])
    for op in (collectives.all_reduce, collectives.reduce_scatter, collectives.all_gather, collectives.all_gather_f32):
        type(op).overlap = collectives.FREELY if job["overlap"] else 0
    data = hg.data.tokens(job["shard"], task.T, task.step_tokens, shuffle=False)
    precision = hg.Precision("bf16" if job["backend"] == "cuda" else "f32")
    how = {"extra_programs": (), "backend": job["backend"], "recompute": job["recompute"], "zero": job["zero"]}
    model, execution = hg.models.gpt2(task.preset), hg.Execution(task.B, **how)
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, precision=precision)

    def steps(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            last = run.step(run.last_step + 1, 1e-4)
        loss[0] = last.loss
        exposed.append(1e3 * last.exposed)
        return 1e3 * (time.perf_counter() - begin) / count

    loss, whole, alone, exposed = [0.0], [], [], []
    steps(3)
    silent = without_collectives(run) if world > 1 and job["silent"] else None
    for _ in range(job["rounds"]):
        whole.append(steps(job["steps"]))
        if silent:
            with silent:
                alone.append(steps(job["steps"]))
    everyone = run.comm.all_gather_object([statistics.median(alone or [0.0]), statistics.median(exposed)])
    params = run.program.num_params
    flops, peak = model.flops_per_token(params, task.T), run.backend.peak_flops(precision.dtype)
    ms = statistics.median(whole)
    mib = used_mib(run)
    return {
        "ms": whole,
        "alone_ms": [ms for ms, _ in everyone],
        "exposed_ms": [ms for _, ms in everyone],
        "loss": loss[0],
        "tok_s": 1e3 * task.step_tokens / ms,
        "mfu": peak and 1e3 * task.step_tokens / ms * flops / peak / world,
        "arena_mib": run.plan.nbytes / 2**20,
        "used_mib": mib,
        "hardware": run.backend.hardware,
    }


class without_collectives:
    """A block in which a run's steps leave out what ranks exchange; weights are then of no use."""

    def __init__(self, run):
        self.nccl, self.train = run.backend._nccl, run._train
        self.whole, self.silent = (self.train._starts, self.train._graphs), None

    def __enter__(self):
        from handgrad.core.op import ONLY

        self.nccl.start = lambda *_: None  # what is bound from here on starts this
        if self.silent is None:
            self.silent = {ONLY: [self.train._bind(i, ONLY) for i in range(len(self.train._chosen))]}, {}
        self.train._starts, self.train._graphs = self.silent

    def __exit__(self, *_):
        del self.nccl.start
        self.train._starts, self.train._graphs = self.whole


def used_mib(run) -> float:
    """Device memory in use on this rank's GPU, by all processes."""
    device = getattr(run.backend, "device", None)
    if device is None:
        return 0.0
    free, total = device.memory()
    return (total - free) / 2**20


def ddp(job: dict) -> Result:
    """The same steps in PyTorch."""
    sys.path.insert(0, str(ROOT / "reference"))
    import numpy as np
    import torch
    import torch.distributed as dist
    from gpt2_torch import GPT2, adamw
    from torch.nn.parallel import DistributedDataParallel

    task, rank, world = task_of(job), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_gpu = job["backend"] == "cuda"
    device = f"cuda:{os.environ['LOCAL_RANK']}" if is_gpu else "cpu"
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu else "gloo")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    vocab = -(-VOCAB // 128) * 128
    model = GPT2(vocab, task.T, task.layers, task.heads, task.hidden, bf16=is_gpu).to(device)
    if is_gpu:
        model.compile()
    model = DistributedDataParallel(model, device_ids=[device] if is_gpu else None, gradient_as_bucket_view=True)
    optimizer = adamw(model.module, 1e-4, (0.9, 0.95), 1e-8, 0.1)
    ids = torch.from_numpy(np.fromfile(job["shard"], np.uint16, offset=HEADER_BYTES).astype("int64"))
    sequences, parts = task.step_tokens // task.T, task.step_tokens // (task.B * task.T * world)

    def step(number: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for k in range(parts):
            first = number * sequences + (k * world + rank) * task.B
            starts = [task.T * (row % ((len(ids) - 1) // task.T)) for row in range(first, first + task.B)]
            both = torch.stack([ids[s : s + task.T + 1] for s in starts])
            if is_gpu:
                both = both.pin_memory().to(device, non_blocking=True)
            model.require_backward_grad_sync = k + 1 == parts
            loss = model(both[:, :-1].contiguous(), both[:, 1:].contiguous())[1] / parts
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    def steps(first: int, count: int) -> float:
        begin = time.perf_counter()
        for number in range(first, first + count):
            last = step(number)
        loss[0] = float(last)
        return 1e3 * (time.perf_counter() - begin) / count

    loss = [0.0]
    steps(0, 3)
    ms = [steps(3 + k * job["steps"], job["steps"]) for k in range(job["rounds"])]
    used = torch.cuda.max_memory_reserved() / 2**20 if is_gpu else 0.0
    dist.destroy_process_group()
    tok_s = 1e3 * task.step_tokens / statistics.median(ms)
    return {"ms": ms, "loss": loss[0], "tok_s": tok_s, "used_mib": used, "torch": torch.__version__}


def worker(path: str) -> None:
    """Does the jobs of a file, one after another; rank 0 prints their results."""
    for job in json.loads(Path(path).read_text()):
        begin = time.perf_counter()
        try:
            found = {"losses": losses, "speed": speed, "ddp": ddp}[job["what"]](job)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        if os.environ["RANK"] == "0" or "failed" in found:
            print(RESULT + json.dumps({"job": job, "seconds": time.perf_counter() - begin} | found), flush=True)
        if "failed" in found:
            os._exit(1)


# the parent -----------------------------------------------------------------------------------------------------------


def ranks(world: int, jobs: list[dict], folder: Path, seconds: float) -> list[Result]:
    """The results of jobs on this many ranks, each a process with the variables of torchrun."""
    path = folder / f"jobs{time.monotonic_ns()}.json"
    path.write_text(json.dumps(jobs))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin, found = time.perf_counter(), []
    processes = []
    for rank in range(world):
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_NVLS_ENABLE": 0}
        env = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, __file__, "--worker", str(path)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    ending = threading.Timer(seconds, lambda: [process.kill() for process in processes])
    ending.start()
    for process in processes:
        for line in process.stdout:
            if line.startswith(RESULT):
                found.append(json.loads(line.removeprefix(RESULT)) | {"world": world})
                say(f"W={world} {brief(found[-1])}")
    for process in processes:
        process.wait()
    ending.cancel()
    say(f"W={world}: {len(found)} of {len(jobs)} jobs in {time.perf_counter() - begin:.0f} s")
    return found


def brief(r: Result) -> str:
    job = r["job"]
    head = f"{job['what']} {job.get('model', '')} zero {job.get('zero', '-')} {r['seconds']:.1f} s: "
    if "failed" in r:
        return head + r["failed"]
    if job["what"] == "losses":
        return head + f"{r['losses'][0]:.4f} .. {r['losses'][-1]:.6f} {r['weights'][:8]}"
    alone = f", alone {r['alone_ms']}, exposed {r['exposed_ms']}" if "alone_ms" in r else ""
    return head + f"{statistics.median(r['ms']):.1f} ms{alone}, {r['tok_s']:,.0f} tok/s, {r['used_mib']:,.0f} MiB"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check(world: int, a: argparse.Namespace, folder: Path) -> list[str]:
    """Correctness of W ranks; lines of the report. Raises SystemExit for a wrong result."""
    base = {"what": "losses", "backend": a.backend, "dtype": a.dtype, "small": str(folder / "small.bin"), "last": STEPS}
    out, lines, tolerance = folder / f"run{world}", [], 3e-5 if a.dtype == "f32" else 3e-3
    (one,) = ranks(1, [base | {"zero": 0}], folder, 120)
    jobs = [base | {"zero": zero} for zero in (0, 1, 2, 3, 1)]
    saved = [base | {"zero": 2, "out": str(out), "last": 8}]
    found = ranks(world, jobs + saved, folder, 240)
    if len(found) < len(jobs) + 1 or any("failed" in r for r in found):
        raise SystemExit(f"W={world}: {found[-1:]}")
    for job, r in zip(jobs[:4], found):
        worst = max(abs(x - y) / y for x, y in zip(r["losses"], one["losses"]))
        worst = max(worst, abs(r["val"] - one["val"]) / one["val"])
        lines.append(f"W={world} zero {job['zero']}: largest relative difference of a loss from one rank {worst:.1e}")
        if worst > tolerance:
            raise SystemExit(f"{lines[-1]}: more than {tolerance}")
    same = found[1]["weights"] == found[4]["weights"] and found[1]["losses"] == found[4]["losses"]
    lines.append(f"W={world} zero 1 twice: {'the same bits' if same else 'DIFFERENT BITS'}")
    if not same:
        raise SystemExit(lines[-1])
    history = found[5]["losses"]
    for count, last in ((1, 14), (world, STEPS)):
        (r,) = ranks(count, [base | {"zero": 3, "out": str(out), "last": last}], folder, 120)
        history += r["losses"]
    worst = max(abs(x - y) / y for x, y in zip(history, one["losses"], strict=True))
    lines.append(f"W={world} saved, resumed on 1, resumed on {world}: largest relative difference {worst:.1e}")
    if worst > tolerance:
        raise SystemExit(f"{lines[-1]}: more than {tolerance}")
    return lines


def race(name: str, a: argparse.Namespace, folder: Path) -> list[Result]:
    """Speed of one model on every number of ranks."""
    task, found = TINY if name == "tiny" else TASKS[name], []
    is_large = task.layers > 40
    base = {"what": "speed", "model": name, "backend": a.backend, "shard": str(folder / "large.bin"), "overlap": True}
    base |= {"rounds": a.rounds, "steps": 1 if is_large else task.rounds_of, "recompute": "none", "silent": False}
    base["zero"] = 1
    limit = 240.0
    for world in a.worlds:
        if world == 1:
            found += ranks(1, [base], folder, limit)
            continue
        jobs = [base | {"zero": zero} for zero in a.zeros]
        jobs += [base | {"zero": zero, "overlap": False} for zero in (a.zeros[0], a.zeros[-1])]
        jobs[0]["silent"] = a.backend == "cuda"
        found += ranks(world, jobs, folder, limit)
        if not a.no_torch and task.torch_mib:
            found += ranks(world, [base | {"what": "ddp"}], folder, limit)
    if 1 in a.worlds and len(a.worlds) > 1:  # again: a GPU that has grown hot is slower
        for again in ranks(1, [base], folder, limit):
            one = next(r for r in found if r["world"] == 1)
            one["ms"] += again["ms"]
            one["tok_s"] = 1e3 * task.step_tokens / statistics.median(one["ms"])
    return found


def table(found: list[Result]) -> list[str]:
    head = f"{'model':7} {'W':>2} {'what':22} {'ms a step':>10} {'tok/s':>11} {'MFU':>6} {'x W=1':>6}"
    lines = [head + f" {'exposed ms':>10} {'alone ms':>9} {'arena MiB':>10} {'used MiB':>9}"]
    one = {r["job"]["model"]: r["tok_s"] for r in found if r["job"]["what"] == "speed" and r["world"] == 1}
    for r in found:
        job, ms = r["job"], statistics.median(r["ms"])
        what = "PyTorch DDP" if job["what"] == "ddp" else f"zero {job['zero']}" if r["world"] > 1 else "one GPU"
        what += "" if job["overlap"] else ", no overlap"
        exposed = f"{max(r['exposed_ms']):.2f}" if r.get("exposed_ms") and r["world"] > 1 else "-"
        alone = f"{max(r['alone_ms']):.2f}" if any(r.get("alone_ms", [])) else "-"
        ratio = r["tok_s"] / one[job["model"]] if job["model"] in one else float("nan")
        mfu = f"{100 * r['mfu']:5.1f}%" if r.get("mfu") else f"{'-':>6}"
        line = f"{job['model']:7} {r['world']:2} {what:22} {ms:10.2f} {r['tok_s']:11,.0f} {mfu} {ratio:6.3f}"
        arena = f"{r['arena_mib']:10,.0f}" if "arena_mib" in r else f"{'-':>10}"
        lines.append(line + f" {exposed:>10} {alone:>9} {arena} {r['used_mib']:9,.0f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=None, help="numbers of ranks")
    parser.add_argument("--models", nargs="+", default=["124m", "1558m"])
    parser.add_argument("--zeros", type=int, nargs="+", default=[1, 0, 2, 3])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="bf16", help="of the correctness runs")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", default="", help="also write the report to this file")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker)
        return
    a.backend = "cpu" if a.smoke else "cuda"
    if a.smoke:
        a.models, a.dtype, a.rounds = ["tiny"], "f32", 1
    a.worlds = a.worlds or [w for w in (1, 2, 4, 8, 16) if w <= gpus()]
    import handgrad as hg

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hg.data.write_random(folder / "small.bin", 128 * SEQUENCES * 6 + 1, SMALL["vocab_size"])
        hg.data.write_random(folder / "large.bin", 1024 * 1024 + 1, VOCAB)
        lines = [] if a.no_check else [line for w in a.worlds if w > 1 for line in check(w, a, folder)]
        found = [r for m in a.models for r in race(m, a, folder)]
    command = shlex.join(["python", *sys.argv])
    hardware = next((r["hardware"] for r in found if "hardware" in r), "")
    lines += ["", f"{command}, {datetime.date.today()}, {hardware}, handgrad {hg.__version__}", ""]
    lines += table([r for r in found if "failed" not in r])
    lines += [f"failed: {r['job']}: {r['failed']}" for r in found if "failed" in r]
    print("\n".join(lines))
    if a.out:
        Path(a.out).write_text("\n".join(lines) + "\n")
        Path(a.out).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def gpus() -> int:
    found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return found.stdout.count("GPU ")


if __name__ == "__main__":
    main()
