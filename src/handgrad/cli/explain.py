"""handgrad explain MODEL: the memory map, the price of every remedy, and every call, without allocating anything."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from handgrad.backends import open_backend, resolve_name
from handgrad.backends.base import Planner
from handgrad.backends.cuda.planner import GPUS, MEMORY_MIB, PRODUCT_NAMES, RESERVE, GpuPlanner
from handgrad.backends.ranks.comm import Planned
from handgrad.cli.flags import parse
from handgrad.cli.ranks import names_gpus
from handgrad.cli.sizes import model_of
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.core.plan import MIB
from handgrad.core.precision import Precision
from handgrad.train.config import ComputeConfig, ModelConfig, OptimConfig, OptimizerName, TuneConfig
from handgrad.train.explain import explain
from handgrad.train.optimizers import optimizer_of
from handgrad.train.resolve import execution_of, precision_of
from handgrad.train.scaling import Cluster, GpuRanks
from handgrad.train.tuning import settled, tuned


@dataclass(frozen=True)
class Explain:
    """Which run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2"
    """tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, d6 .. d84 (or any d<layers>), gpt3:c384 .. gpt3:c12288,
    llama3.2-1b, llama3.1-8b, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen3-0.6b, gemma3-270m,
    bert-base, pythia-70m, pythia-160m, pythia-410m, t5-small, t5-base, t5-v1.1-small, t5-v1.1-base;
    or a model on disk: a run, a Hugging Face folder, a .gguf, a .bin, hf:NAME, whose sizes it takes"""
    calls: bool = False
    """print every call too, with its shapes, offsets, kernel and source line"""
    gpu: Annotated[Literal["a100", "4090", "h100", "h200", "b200"] | None, tyro.conf.arg(metavar="GPU")] = None
    """a100, 4090, h100, h200 or b200, which need not be here, and the cuda backend; --backend cuda alone: an h100"""
    family: str = ModelConfig.family
    """architecture: bert, gemma, gpt2, llama, gpt_neox, t5; empty: the model's own"""
    seq_len: int = 0
    """tokens in a sequence; 0: the model's longest, 2048 at most for a Llama, a T5's targets"""
    batch_tokens: int = 0
    """tokens in an optimizer step; 0: one micro-batch a rank. More accumulates gradients"""
    ranks: int = 1
    """processes that train together, on CPUs or one on each GPU; the page is that of one of them"""
    nodes: int = 1
    """machines that ranks on GPUs are divided among"""
    link: Annotated[Literal["nvlink", "pcie", "ib"] | None, tyro.conf.arg(metavar="LINK")] = None
    """between the GPUs of a machine: nvlink or pcie. Machines are joined by ib: InfiniBand, 400 Gbit/s for each GPU"""
    mfu: float = 0.0
    """MFU that one GPU reaches, for the time of a step of several, such as 0.5; 0: as measured for the nearest model"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: the model's"""
    optimizer: OptimizerName = OptimConfig.optimizer
    """whose state the run holds"""
    moments: Literal["f32", "bf16", "int8"] = OptimConfig.moments
    """type of adamw's moments"""
    momentum: float | None = OptimConfig.momentum
    """of sgd, which has no state without it; None: the optimizer's own"""
    ema: float = OptimConfig.ema
    """decay of an average of the weights, such as 0.999; 0: none"""
    dropout: float = ModelConfig.dropout
    """probability of dropping embeddings, attention weights and branches, of a GPT-2, BERT or T5"""
    documents: bool = False
    """plan for attention within documents, as a run with --documents or on chats does"""
    val: bool = True
    """plan for validation too, as a run with a validation set does"""
    sample: bool = True
    """plan for samples too, as a run that prints them does"""
    tune: TuneConfig = field(default_factory=TuneConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    """Prints the page."""
    a = parse(Explain, argv, "explain")
    changes = {name: getattr(a, name) for name in ("vocab_size", "dropout") if getattr(a, name)}
    model = model_of(a.model, a.family, **changes)
    seq_len = whole("explain", "--seq-len", a.seq_len, 0) or model.usual_seq_len
    whole("explain", "--batch-tokens", a.batch_tokens, 0)
    least = whole("explain", "--ranks", a.ranks, 1) * a.compute.micro_batch * seq_len
    accumulation, rest = divmod(a.batch_tokens or least, least)
    if rest or accumulation < 1:
        rule = f"--batch-tokens is a multiple of micro-batch x seq-len = {a.compute.micro_batch} x {seq_len}"
        rule += f", times {a.ranks} ranks" if a.ranks > 1 else ""
        raise HandgradError("explain", rule, a.batch_tokens)
    is_gpu = a.gpu or (a.compute.backend == "auto" and (on_gpus(a) or names_gpus(argv)))
    name: Any = "cuda" if is_gpu else resolve_name(a.compute.backend)
    h = replace(a.compute, backend=name)
    precision = precision_of(h)
    execution = execution_of(h, tuple(name for name in ("val", "sample") if getattr(a, name)))
    execution = tuned(replace(execution, documents=a.documents), settled(a.tune, is_resumed=False))
    if on_gpus(a) and (name != "cuda" or a.ranks == 1):
        rule, found = "--nodes, --link and --mfu are of several ranks on GPUs", f"--backend {name} --ranks {a.ranks}"
        raise HandgradError("explain", rule, found, hint="--gpu h200 --ranks 8")
    backend, where, saving = planner(h, a, precision)
    kinds: dict[str, Any] = {"execution": execution, "precision": precision}
    names = ("optimizer", "moments", "momentum", "ema")
    optim = optimizer_of(OptimConfig(**{name: getattr(a, name) for name in names}))
    page = explain(model, seq_len, backend=backend, accumulation=accumulation, optim=optim, **kinds)
    micro_batches = f"{accumulation} micro-batch{'es' * (accumulation > 1)} of {h.micro_batch} x {seq_len} tokens"
    each = f" on each of {a.ranks} ranks, zero {h.zero}: one of them" if a.ranks > 1 else ""
    print(f"{a.model}, {precision.dtype}, a step of {micro_batches}{each}\n")
    print(page)
    if a.ranks > 1 and not page.prediction:
        print("\nlinks between CPUs are not known; for the time of a step on GPUs: --gpu h200")
    print(f"\nscratch is that of {where}; the run allocates these bytes once")
    if name == "cuda":
        print(fit(a.gpu or "h100", page.plan.nbytes))
    print(f"a checkpoint is {page.checkpoint_bytes / MIB:.1f} MiB, {saving}")
    print(f"\n{page.calls()}" if a.calls else "every call, with its shapes and offsets: --calls")
    return 0


def on_gpus(a: Explain) -> bool:
    """Whether a flag says that the ranks run on GPUs, besides --gpu and --backend."""
    return a.nodes != 1 or bool(a.link or a.mfu)


def fit(gpu: str, nbytes: int) -> str:
    """Which GPU the page assumes, and whether an arena fits in its memory."""
    fits = "fits" if nbytes + RESERVE <= MEMORY_MIB[gpu] * MIB else "does not fit"
    arena = f"the arena of {nbytes / MIB:,.0f} MiB {fits} in its {MEMORY_MIB[gpu]:,} MiB"
    return f"assumed GPU: {PRODUCT_NAMES[gpu]} (--gpu names another); {arena}"


def planner(h: ComputeConfig, a: Explain, precision: Precision) -> tuple[Planner, str, str]:
    """(what plans the run, its name, how a checkpoint of its arena is written)."""
    if h.backend == "cuda":
        name, saving = a.gpu or "h100", "copied to host memory first, which needs that much there"
        where = f"the cuda backend on an {PRODUCT_NAMES[name]}"
        if a.ranks > 1:
            return GpuRanks(Cluster(name, a.ranks, a.nodes, a.link, a.mfu), precision), where, saving
        gpu = replace(GPUS[name], tf32=precision.tf32, deterministic=precision.deterministic)
        return GpuPlanner(gpu), where, saving
    backend = open_backend(h.backend, h.threads, precision)
    if a.ranks > 1:
        backend.comm = Planned(a.ranks)
    return backend, f"the {backend.name} backend, {backend.hardware}", "written from where it lies, without a copy"
