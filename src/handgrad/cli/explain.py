"""handgrad explain MODEL: the listing, the memory map and the price of every remedy, without allocating anything."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from handgrad.backends import open_backend
from handgrad.backends.base import Planner
from handgrad.backends.cuda.planner import GPUS, PRODUCT_NAMES, GpuPlanner
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.core.plan import MIB
from handgrad.core.precision import Precision
from handgrad.models import create, preset
from handgrad.train.execution import Execution
from handgrad.train.explain import explain


@dataclass(frozen=True)
class Explain:
    """Which run."""

    model: Annotated[str, tyro.conf.Positional] = "gpt2-124m"
    """tiny, gpt2-124m .. gpt2-1558m, d6 .. d84 or any d<layers>, gpt3:c384 .. gpt3:c12288"""
    family: str = "gpt2"
    """architecture, by the name that handgrad.models registers: gpt2"""
    micro_batch: int = 16
    """sequences in one forward and backward pass"""
    seq_len: int = 0
    """tokens in a sequence; 0: the model's longest"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: GPT-2's 50257"""
    dropout: float = 0.0
    """probability of dropping"""
    dtype: Literal["bf16", "tf32", "f32"] = "bf16"
    """working dtype"""
    master_weights: bool = True
    """bf16 weights keep the low 16 bits of their float32"""
    grad_dtype: Literal["f32", "bf16"] = "f32"
    """of parameter gradients; bf16 needs a GPU"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """whose scratch and workspaces are counted"""
    gpu: Literal["", "a100", "4090", "h100", "h200", "b200"] = ""
    """a GPU, which need not be in this machine, and the cuda backend; --backend cuda alone takes an h100"""
    deterministic: bool = False
    """as in a run"""
    recompute: Literal["none", "act", "act_norm", "block"] = "act"
    """what backward computes again instead of keeping it"""
    head_mib: int = 0
    """MiB of the head's logits that exist at a time; 0: the backend's own size"""
    val: bool = True
    """plan for validation too, as a run with a validation set does"""
    sample: bool = True
    """plan for samples too, as a run that prints them does"""
    accumulation: int = 1
    """micro-batches in an optimizer step"""
    threads: int = 0
    """CPU threads; each needs scratch of its own. 0: the physical cores that this process may use"""


def main(argv: list[str]) -> int:
    """Prints the page."""
    a = parse(Explain, argv, "explain")
    for name, least in (("micro_batch", 1), ("head_mib", 0), ("accumulation", 1)):
        if getattr(a, name) < least:
            raise HandgradError("explain", f"--{name.replace('_', '-')} is at least {least}", getattr(a, name))
    sizes = preset(a.model)
    sizes |= {"vocab_size": a.vocab_size} if a.vocab_size else {}
    model = create(a.family, sizes | ({"dropout": a.dropout} if a.dropout else {}))
    precision = Precision(a.dtype, a.grad_dtype, a.master_weights, a.deterministic)
    extra = tuple(name for name in ("val", "sample") if getattr(a, name))
    execution = Execution(
        micro_batch=a.micro_batch,
        recompute=a.recompute,
        head_bytes=a.head_mib * MIB,
        extra_programs=extra,
        backend=a.backend,
        threads=a.threads,
    )
    backend, where, saving = planner(a, precision)
    page = explain(
        model,
        a.seq_len or model.max_seq_len,
        execution=execution,
        precision=precision,
        backend=backend,
        accumulation=a.accumulation,
    )
    print(page)
    print(f"\nscratch is that of {where}; the run allocates these bytes once")
    saved = page.program.num_params * sum(v.dtype.size for name, v in page.plan.vectors.items() if name != "grad")
    print(f"a checkpoint is {saved / MIB:.1f} MiB, {saving}")
    return 0


def planner(a: Explain, precision: Precision) -> tuple[Planner, str, str]:
    """(what plans the run, its name, how a checkpoint of its arena is written)."""
    if a.gpu or a.backend == "cuda":
        gpu = replace(GPUS[a.gpu or "h100"], tf32=precision.tf32, deterministic=precision.deterministic)
        saving = "copied to the host's memory first, as much of it as that"
        return GpuPlanner(gpu), f"the cuda backend on an {PRODUCT_NAMES[a.gpu or 'h100']}", saving
    backend = open_backend("cpu", a.threads, precision)
    return backend, f"the cpu backend, {backend.hardware}", "written from where it lies, without a copy"
