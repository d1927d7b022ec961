"""Whole training steps on one GPU: handgrad against PyTorch on the same GPU in the same run.

    python bench/gpu_step.py                             four sizes, PyTorch for three of them; 5 to 6 minutes
    python bench/gpu_step.py --models 124m --no-torch    one size, handgrad alone; half a minute
    python bench/gpu_step.py --models qwen0.5b bert      other families
    python bench/gpu_step.py --models 124m --no-torch --optimizer muon    what a step of Muon costs
    python bench/gpu_step.py --smoke                     a tiny model on the CPU, to test this script

A step is gradient accumulation over T = 1024, clipping and AdamW, on the same random tokens for both. PyTorch is the
model of reference/{gpt2,llama,bert,t5}_torch.py with torch.compile, bf16 autocast, SDPA, fused AdamW, TF32 allowed,
and its vocabulary padded to a multiple of 128, which is faster. Every contender is a process of its own, and each round
runs them in turn; if both do not fit on the GPU, handgrad runs before and after PyTorch. The script reports the median
ms a step over the rounds, tok/s, MFU by the model's formula, device memory of the process, the CPU time that the host
needs to start a step, and the time from the start of the process to its first finished step, with an empty and with a
full cache.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
VOCAB = 50257
HEADER_BYTES = 1024
WARMUP = {"handgrad": 2, "torch": 1}  # steps after the first; handgrad captures its graphs in the second step
MARGIN_MIB = 3000  # left free when two processes share the GPU
PACKAGES = (
    "handgrad",
    "numpy",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "nvidia-cudnn-frontend",
    "nvidia-cudnn-jit-cu13",
)


@dataclass(frozen=True)
class Task:
    """A model and its batch. rounds_of: steps in a round, about two seconds. torch_mib: memory that PyTorch needs at
    this size; 0: skip PyTorch."""

    preset: str
    layers: int
    heads: int
    hidden: int
    B: int
    T: int
    step_tokens: int
    rounds_of: int
    torch_mib: int


TASKS = {
    "124m": Task("gpt2-124m", 12, 12, 768, 64, 1024, 524288, 3, 31000),
    "350m": Task("gpt2-355m", 24, 16, 1024, 32, 1024, 524288, 1, 38500),
    "774m": Task("gpt2-774m", 36, 20, 1280, 16, 1024, 262144, 1, 42500),
    "1558m": Task("gpt2-1558m", 48, 25, 1600, 8, 1024, 262144, 1, 0),
    "qwen0.5b": Task("qwen2.5-0.5b", 24, 14, 896, 16, 1024, 524288, 1, 70000),
    "qwen1.5b": Task("qwen2.5-1.5b", 28, 12, 1536, 16, 1024, 131072, 2, 73000),
    "llama1b": Task("llama3.2-1b", 16, 32, 2048, 8, 2048, 262144, 1, 90000),
    "bert": Task("bert-base", 12, 12, 768, 64, 512, 262144, 3, 40000),
    "t5": Task("t5-base", 12, 12, 768, 64, 114, 4 * 64 * 114, 3, 40000),
    "smoke": Task("d2", 2, 2, 128, 2, 32, 128, 1, 1),
}


# workers -------------------------------------------------------------------------------------------------------------


class Handgrad:
    """Steps in handgrad. options: fields of Execution and Precision, and the name of the optimizer."""

    def __init__(self, task: Task, shard: str, device: str, options: dict):
        import handgrad as hg

        self.model, dtype = hg.models.preset(task.preset), "bf16" if device == "cuda" else "f32"
        objective: hg.data.Objective = hg.data.Causal()
        optim = hg.optim.OPTIMIZERS[options.pop("optimizer", "adamw")]()
        if task.preset == "bert-base":  # masked tokens alone
            self.model = hg.models.preset(task.preset, vocab_size=30592, pooler=False, nsp=False)
            ids = dict(mask_id=103, cls_id=101, sep_id=102, pad_id=0)
            objective = hg.data.Masked(**ids, vocab_size=self.model.vocab_size)
        if self.model.family == "t5":
            first, end, pad = self.model.special_ids
            source = self.model.max_seq_len
            objective = hg.data.Spans(first_sentinel=first, eos_id=end, pad_id=pad, source_len=source)
        data = hg.data.tokens(shard, task.T, task.step_tokens, shuffle=False, objective=objective)
        kinds = {f.name for f in dataclasses.fields(hg.Precision)}
        precision = hg.Precision(**{"dtype": dtype} | {k: v for k, v in options.items() if k in kinds})
        how = {"extra_programs": (), "backend": device} | {k: v for k, v in options.items() if k not in kinds}
        kind = dict(execution=hg.Execution(task.B, **how), precision=precision)
        self.run = hg.Trainer(self.model, optim, data, **kind)
        self.task, self.dtype = task, precision.dtype

    def steps(self, count: int) -> float:
        """Runs `count` steps; returns the last loss."""
        for _ in range(count):
            last = self.run.step(self.run.last_step + 1, 1e-4)
        return last.loss

    def host_ms(self) -> float:
        """Milliseconds of CPU time that the host needs to start a step."""
        begin = time.thread_time()
        last = self.run.step(self.run.last_step + 1, 1e-4)
        ms = 1e3 * (time.thread_time() - begin)
        last.loss  # noqa: B018  waits for the device
        return ms

    def facts(self) -> dict:
        ms: dict[str, float] = {}
        for _ in range(2):  # the first is a warm-up
            ms = {}
            self.run.trace(lambda c, s, ms=ms: ms.update({c.op.name: ms.get(c.op.name, 0.0) + 1e3 * s}))
        params = self.run.program.num_params
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "hardware": self.run.backend.hardware,
            "params": params,
            "arena": self.run.plan.nbytes,
            "flops_per_token": self.model.flops_per_token(params, self.task.T),
            "peak_flops": self.run.backend.peak_flops(self.dtype),
            "notes": sorted({f"{c.op.name}: {n}" for c in self.run.program.calls if (n := self.run.backend.note(c))}),
            "micro_step_ms_by_op": dict(sorted(ms.items(), key=lambda item: -item[1])),
            "versions": versions,
        }


class Torch:
    """The same steps in PyTorch."""

    def __init__(self, task: Task, shard: str, device: str, options: dict):
        sys.path.insert(0, str(ROOT / "reference"))
        import bert_torch
        import numpy as np
        import t5_torch
        import torch
        from gpt2_torch import GPT2, adamw
        from llama_torch import SIZES, Llama

        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.torch, self.task, self.done = torch, task, 0
        self.ids = np.fromfile(shard, np.uint16, offset=HEADER_BYTES)
        bf16 = device == "cuda"
        self.masked = task.preset in bert_torch.SIZES
        self.source = t5_torch.SIZES[task.preset][-1] if task.preset in t5_torch.SIZES else 0
        if self.masked:
            self.model = bert_torch.Bert(task.preset, bf16=bf16).to(device)
        elif self.source:
            self.model = t5_torch.T5(task.preset, task.T, bf16=bf16).to(device)
        elif task.preset in SIZES:
            self.model = Llama(task.preset, task.T, bf16=bf16).to(device)
        else:
            vocab = -(-VOCAB // 128) * 128
            self.model = GPT2(vocab, task.T, task.layers, task.heads, task.hidden, bf16=bf16).to(device)
        self.model.compile()
        self.optimizer = adamw(self.model, 1e-4, (0.9, 0.95), 1e-8, 0.1)
        self.device = device

    def _batch(self, micro_step: int):
        """The same sequences as handgrad's, in the same order; for a T5 as many tokens, without gaps."""
        t, sequences = self.task, self.task.step_tokens // self.task.T
        first = self.done * sequences + micro_step * t.B
        width = t.T + self.source
        starts = [width * (row % ((len(self.ids) - 1) // width)) for row in range(first, first + t.B)]
        both = self.torch.stack([self.torch.from_numpy(self.ids[s : s + width + 1].astype("int64")) for s in starts])
        if self.device == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        if self.source:
            both, source = both[:, self.source :], both[:, : self.source].contiguous()
        ids = both[:, :-1].contiguous()
        if self.source:
            return source, ids, both[:, 1:].contiguous()
        if not self.masked:
            return ids, both[:, 1:].contiguous()
        each = round(0.15 * t.T)  # predictions: as many rows of every sequence, the ids themselves
        rows = self.torch.arange(t.B, device=ids.device)[:, None] * t.T + 6 * self.torch.arange(each, device=ids.device)
        return ids, rows.flatten(), ids.flatten()[rows.flatten()]

    def _step(self):
        parts = self.task.step_tokens // (self.task.B * self.task.T)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for k in range(parts):
            loss = self.model(*self._batch(k))[1] / parts
            loss.backward()
            total = total + loss.detach()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return total

    def steps(self, count: int) -> float:
        """Runs `count` steps; returns the last loss."""
        for _ in range(count):
            last = self._step()
        return float(last)

    def host_ms(self) -> float:
        """Milliseconds of CPU time that the host needs to start a step."""
        begin = time.thread_time()
        last = self._step()
        ms = 1e3 * (time.thread_time() - begin)
        float(last)
        return ms

    def facts(self) -> dict:
        torch = self.torch
        facts = {"versions": {"torch": torch.__version__}}
        if self.device == "cuda":
            facts["versions"] |= {"torch's cuda": torch.version.cuda, "torch's cudnn": torch.backends.cudnn.version()}
            facts |= {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
        return facts


def worker(kind: str, name: str, shard: str, device: str, options: str) -> None:
    """The worker process: runs one step, reports it, then answers each line of standard input with a line of JSON."""
    contender = {"handgrad": Handgrad, "torch": Torch}[kind](TASKS[name], shard, device, json.loads(options))
    loss = contender.steps(1)
    print(json.dumps({"loss": loss}), flush=True)
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "steps":
            begin = time.perf_counter()
            loss = contender.steps(int(count))
            answer = {"ms": 1e3 * (time.perf_counter() - begin) / int(count), "loss": loss}
        else:
            answer = {"ms": contender.host_ms()} if command == "host" else contender.facts()
        print(json.dumps(answer), flush=True)


# measurement ----------------------------------------------------------------------------------------------------------


class Process:
    """A contender's process. `startup`: seconds to its first finished step. `mib`: device memory it took by then."""

    def __init__(self, kind: str, name: str, shard: str, a: argparse.Namespace, cache: str):
        used, begin = used_mib(), time.perf_counter()
        python = a.torch_python if kind == "torch" else sys.executable
        words = [
            kind,
            name,
            shard,
            "cpu" if a.smoke else "cuda",
            json.dumps(a.trainer | {"optimizer": a.optimizer} if kind == "handgrad" else {}),
        ]
        self.kind, self._before = kind, used
        self._process = subprocess.Popen(
            [python, __file__, "--worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HANDGRAD_CACHE": cache},
        )
        first = self._read()
        self.startup, self.first_loss, self.mib = time.perf_counter() - begin, first["loss"], used_mib() - used
        say(f"{name} {kind}: first step after {self.startup:.1f} s, loss {self.first_loss:.3f}, {self.mib} MiB")

    def ask(self, command: str) -> dict:
        """The answer to a command; raises RuntimeError if the process has died."""
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError:
            pass
        return self._read()

    def _read(self) -> dict:
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.kind} ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the process and waits until its device memory is free."""
        self._process.stdin.close()
        self._process.wait()
        for _ in range(20):
            if used_mib() <= self._before + 200:
                break
            time.sleep(0.25)


def used_mib() -> int:
    """MiB in use on the first GPU, by all processes; 0 without a GPU."""
    return int(smi("memory.used").split()[0])


def smi(query: str) -> str:
    """The value that nvidia-smi reports for the first GPU; "0" without nvidia-smi."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "0"


def say(text: str) -> None:
    """Prints progress to standard error, so that standard output has the table only."""
    print(text, file=sys.stderr, flush=True)


def race(name: str, shard: str, a: argparse.Namespace, cache: str) -> dict:
    """Results by contender for one model."""
    task = TASKS[name]
    times: dict[str, list[float]] = {"handgrad": []}
    facts: dict[str, dict] = {}

    def begin(kind: str) -> Process:
        p = Process(kind, name, shard, a, cache)
        p.ask(f"steps {WARMUP[kind]}")
        facts.setdefault(kind, {"startup": p.startup, "first_loss": p.first_loss})
        return p

    def end(p: Process) -> None:
        if "versions" not in facts[p.kind]:
            facts[p.kind]["mib"] = p.mib
            tries = 3 if p.kind == "handgrad" else 1
            facts[p.kind]["host_ms"] = statistics.median(p.ask("host")["ms"] for _ in range(tries))
            facts[p.kind] |= p.ask("facts")
        p.close()

    def rounds(*processes: Process, count: int) -> None:
        for _ in range(count):
            for p in processes:
                times.setdefault(p.kind, []).append(p.ask(f"steps {a.steps or task.rounds_of}")["ms"])

    ours = begin("handgrad")
    if a.no_torch or not task.torch_mib:
        rounds(ours, count=a.rounds)
        end(ours)
    elif a.smoke or total_mib() - used_mib() > task.torch_mib + MARGIN_MIB:
        try:
            theirs = begin("torch")
            rounds(ours, theirs, count=a.rounds)
            end(theirs)
        except RuntimeError as error:  # its message is on standard error
            facts["torch"] = {"failed": str(error)}
            rounds(ours, count=a.rounds)
        end(ours)
    else:
        say(f"{name}: both do not fit on the GPU; handgrad runs before and after PyTorch")
        rounds(ours, count=(a.rounds + 1) // 2)
        end(ours)
        try:
            theirs = begin("torch")
            rounds(theirs, count=a.rounds)
            end(theirs)
        except RuntimeError as error:
            facts["torch"] = {"failed": str(error)}
        ours = begin("handgrad")
        rounds(ours, count=a.rounds // 2)
        end(ours)
    if name in ("124m", "smoke"):  # the cache is full now
        again = Process("handgrad", name, shard, a, cache)
        facts["handgrad"]["startup_warm"] = again.startup
        again.close()
    results = {}
    for kind, f in facts.items():
        results[kind] = f
        if times.get(kind) and "failed" not in f:
            ms = statistics.median(times[kind])
            speed = 1e3 * task.step_tokens / ms
            results[kind] = {"median_ms": ms, "all_ms": times[kind], "tokens_per_second": speed} | f
    mine = results["handgrad"]
    for r in results.values():
        if "median_ms" in r and mine.get("peak_flops"):
            r["mfu"] = r["tokens_per_second"] * mine["flops_per_token"] / mine["peak_flops"]
    return results


def total_mib() -> int:
    """Memory of the first GPU, MiB."""
    return int(smi("memory.total").split()[0])


def table(results: dict, models: list[str]) -> str:
    """The results as text."""
    facts = results["facts"]
    lines = [f"{key:10} {value}" for key, value in facts.items()]
    head = f"{'model':17}{'B':>3}{'ms/step':>10}{'tok/s':>9}{'MFU %':>7}{'ratio':>7}{'GiB':>7}"
    lines += ["", f"{head}{'host ms':>9}{'start s':>9}{'warm s':>8}"]
    for name in models:
        found = results["models"].get(name, {})
        base = found.get("torch", {}).get("median_ms")
        for kind, r in found.items():
            if "median_ms" not in r:
                lines.append(f"{name:7}{kind:10} {r.get('failed', 'no result')}")
                continue
            ratio = f"{base / r['median_ms']:7.2f}" if base else f"{'-':>7}"
            mfu = f"{100 * r['mfu']:7.1f}" if "mfu" in r else f"{'-':>7}"
            warm = f"{r['startup_warm']:8.1f}" if "startup_warm" in r else ""
            lines.append(
                f"{name:7}{kind:10}{TASKS[name].B:3}{r['median_ms']:10.1f}{r['tokens_per_second']:9.0f}{mfu}{ratio}"
                f"{r['mib'] / 1024:7.1f}{r['host_ms']:9.2f}{r['startup']:9.1f}{warm}"
            )
    lines += [
        "",
        "ratio: PyTorch's ms over this row's; GiB: device memory of the process; host: CPU time to start a step;",
        "start: to the first finished step, with a cache that is empty for the first model; warm: with a full cache",
    ]
    for name in models:
        mine = results["models"].get(name, {}).get("handgrad", {})
        if "micro_step_ms_by_op" in mine:
            ops = "  ".join(f"{op} {ms:.2f}" for op, ms in mine["micro_step_ms_by_op"].items())
            host = 100 * mine["host_ms"] / mine["median_ms"]
            what = f"arena {mine['arena'] / 2**30:.2f} GiB, host {host:.2f} % of the step"
            lines.append("; ".join([f"{name}: {what}", *mine["notes"]]))
            lines.append(f"{name}: ms of one micro-step and the update, call by call: {ops}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=["124m", "350m", "774m", "1558m"])
    parser.add_argument("--steps", type=int, default=0, help="steps in a round; 0: about two seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", default="adamw", help="handgrad's, by name; PyTorch's is AdamW")
    parser.add_argument("--no-torch", action="store_true", help="handgrad alone")
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has PyTorch")
    parser.add_argument(
        "--trainer", type=json.loads, default={"recompute": "none"}, help="fields of Execution and Precision, as JSON"
    )
    parser.add_argument("--json", type=Path, help="results; the table goes beside it, as .txt")
    parser.add_argument("--commit", default="", help="what to call this tree where git does not know")
    parser.add_argument("--smoke", action="store_true", help="a toy on the CPU; writes only where --json says")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(*a.worker)
    models = ["smoke"] if a.smoke else a.models
    out = a.json or (None if a.smoke else ROOT / "bench" / "results" / "gpu_step.json")
    card, driver, watts = (smi("name,driver_version,power.limit").split(", ") + ["", ""])[:3]
    results = {
        "facts": {
            "card": platform.machine() if a.smoke else f"{card}, {watts} W, driver {driver}",
            "date": datetime.date.today().isoformat(),
            "commit": a.commit or commit(),
            "command": shlex.join(["python", "bench/gpu_step.py", *(word.split("/")[-1] for word in sys.argv[1:])]),
        },
        "models": {},
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            shard = f"{folder}/{name}.bin"
            count, vocab = (12 if name == "t5" else 2), (30000 if name in ("bert", "t5") else VOCAB)
            write_random(shard, count * TASKS[name].step_tokens + 1, vocab)
            try:
                results["models"][name] = race(name, shard, a, f"{folder}/cache")
            except RuntimeError as error:
                results["models"][name] = {"handgrad": {"failed": str(error)}}
            found = results["models"][name].values()
            versions = {k: v for r in found for k, v in r.get("versions", {}).items()}
            if versions:
                results["facts"]["versions"] = results["facts"].get("versions", {}) | versions
            results["facts"]["took"] = f"{time.perf_counter() - start:.0f} s"
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
                out.with_suffix(".txt").write_text(table(results, models) + "\n")
    print(table(results, models))


def commit() -> str:
    """The commit of the measured tree, with a star if it has changes."""
    try:
        command = ["git", "describe", "--always", "--dirty=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_random(path: str, count: int, vocab: int = VOCAB) -> None:
    """Writes a token shard of random ids, which both contenders read."""
    import numpy as np

    header = np.zeros(HEADER_BYTES // 4, np.int32)
    header[:3] = 20240520, 1, count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.random.default_rng(0).integers(0, vocab, count).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
