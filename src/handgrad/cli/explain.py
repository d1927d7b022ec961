"""handgrad explain MODEL: the listing, the memory map and the price of every remedy, without allocating anything."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from handgrad.backends import open_backend
from handgrad.backends.cuda.planner import GPUS, PRODUCT_NAMES, GpuPlanner
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.core.plan import MIB
from handgrad.models import GPT2, preset
from handgrad.train.explain import explain


@dataclass(frozen=True)
class Explain:
    """Which run."""

    model: Annotated[str, tyro.conf.Positional] = "gpt2-124m"
    """tiny, gpt2-124m .. gpt2-1558m, d6 .. d84 or any d<layers>, gpt3:c384 .. gpt3:c12288"""
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
    """bf16 weights keep their low 16 bits beside them"""
    grad_dtype: Literal["f32", "bf16"] = "f32"
    """of parameter gradients; bf16 needs a GPU"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """whose scratch and workspaces are counted"""
    gpu: Literal["", "a100", "4090", "h100", "h200", "b200"] = ""
    """a card, which may be elsewhere, and the cuda backend; with that backend alone an h100"""
    deterministic: bool = False
    """as in a run"""
    recompute: Literal["none", "act", "act_norm", "block"] = "act"
    """what is computed again in backward instead of kept"""
    head_chunks: int = 0
    """pieces in which the head's logits are made; 0: pieces of the backend's own size"""
    val: bool = True
    """plan for validation too, as a run with a validation set does"""
    sample: bool = True
    """plan for samples too, as a run that prints them does"""
    accumulation: int = 1
    """micro-batches in an optimizer step"""
    threads: int = 0
    """CPU threads; each needs scratch of its own. 0: physical cores"""


def main(argv: list[str]) -> int:
    """Prints the page."""
    a = parse(Explain, argv, "explain")
    if a.micro_batch < 1:
        raise HandgradError("explain", "--micro-batch is at least 1", a.micro_batch)
    sizes = preset(a.model)
    if a.vocab_size:
        sizes["vocab_size"] = a.vocab_size
    model = GPT2(**sizes, dropout=a.dropout)
    if a.gpu or a.backend == "cuda":
        gpu = replace(GPUS[a.gpu or "h100"], tf32=a.dtype == "tf32", deterministic=a.deterministic)
        backend, where = GpuPlanner(gpu), f"the cuda backend on an {PRODUCT_NAMES[a.gpu or 'h100']}"
        saving = "copied to the host's memory first, as much of it as that"
    else:
        backend = open_backend("cpu", a.threads)
        where, saving = f"the cpu backend, {backend.hardware}", "written from where it lies, without a copy"
    page = explain(
        model,
        a.micro_batch,
        a.seq_len or model.max_seq_len,
        dtype=a.dtype,
        grad_dtype=a.grad_dtype,
        master_weights=a.master_weights,
        backend=backend,
        recompute=a.recompute,
        head_chunks=a.head_chunks,
        accumulation=a.accumulation,
        val=a.val,
        sample=a.sample,
    )
    print(page)
    print(f"\nscratch is that of {where}; the run allocates these bytes once")
    saved = page.program.num_params * sum(d.size for flat, (_, d) in page.plan.flats.items() if flat != "grad")
    print(f"a checkpoint is {saved / MIB:.1f} MiB, {saving}")
    return 0
