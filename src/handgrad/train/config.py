"""The settings of a run: four groups of flags, with the defaults of the Shakespeare recipe.

What is 0 or empty is resolved from the rest (resolve.py); the resolved table is printed and saved.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handgrad.core.errors import HandgradError

SIZES = ("num_layers", "num_heads", "hidden_size", "max_seq_len")  # a preset's, of which each may be set alone


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    family: str = "gpt2"
    """architecture, by the name that handgrad.models registers: gpt2"""
    preset: str = "tiny"
    """tiny, gpt2-124m, gpt2-355m, gpt2-774m, gpt2-1558m, d6 .. d84, gpt3:c384 .. gpt3:c12288"""
    depth: int = 0
    """number of layers, width 64 per layer; replaces the preset"""
    num_layers: int = 0
    """layers; 0: the preset's"""
    num_heads: int = 0
    """attention heads; 0: the preset's"""
    hidden_size: int = 0
    """width; 0: the preset's"""
    max_seq_len: int = 0
    """longest sequence, tokens; 0: the preset's"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: the data's"""
    dropout: float = 0.0
    """probability of dropping embeddings, attention weights and branches"""
    tie_embeddings: bool = True
    """use the token embedding as the head"""
    init: str = "random"
    """start weights: random (of --run.seed), llmc (those of llm.c, seed 42), or a model on disk, with its sizes"""

    def __post_init__(self) -> None:
        _check(self, "model", 0, "depth num_layers num_heads hidden_size max_seq_len vocab_size")


@dataclass(frozen=True)
class DataConfig:
    """What it reads."""

    train: str = "shakespeare"
    """'shakespeare' (in the package), a folder made by `handgrad data`, or a glob of .bin token shards"""
    val: str = ""
    """glob of validation shards; empty: the folder's own"""
    seq_len: int = 0
    """tokens in a training sequence; 0: the model's longest"""
    batch_tokens: int = 0
    """tokens in an optimizer step; 0: one micro-batch. More accumulates gradients"""
    shuffle: bool = True
    """visit the sequences in random order"""
    overfit: bool = False
    """every step takes the batch of the first: can the model memorise it?"""

    def __post_init__(self) -> None:
        _check(self, "data", 0, "seq_len batch_tokens")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 2e-3
    """peak learning rate"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.99
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """of matrices and embeddings; biases and norms do not decay"""
    clip: float = 1.0
    """largest global gradient norm; 0: no clipping"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """shape of the learning rate after warm-up"""
    warmup: int = 100
    """steps from 0 to the peak"""
    final: float | None = None
    """last learning rate as a fraction of the peak; None: the schedule's own (cosine 0.1, linear 0, wsd 0)"""

    def __post_init__(self) -> None:
        _check(self, "optim", 0, "lr warmup" if self.final is None else "lr warmup final")


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and with what."""

    out: str = ""
    """run folder; empty: runs/<data>-NNN, the next free number"""
    resume: str = ""
    """run folder whose newest complete checkpoint to resume; auto: the one in --run.out, or a new run"""
    steps: int = 2000
    """optimizer steps; 0: one epoch"""
    micro_batch: int = 12
    """sequences in one forward and backward pass"""
    dtype: Literal["auto", "f32", "tf32", "bf16"] = "auto"
    """working dtype; tf32: float32 with TF32 matmuls on a GPU; auto: bf16 where the hardware multiplies it"""
    master_weights: bool = True
    """bf16 weights keep the low 16 bits of their float32; without, updates are rounded stochastically"""
    grad_dtype: Literal["f32", "bf16"] = "f32"
    """of parameter gradients; bf16 needs a GPU"""
    backend: Literal["auto", "cpu", "cuda", "ref"] = "auto"
    """auto: cuda where there is a GPU, else cpu; cpu: C kernels; ref: numpy in float64, slow"""
    deterministic: bool = False
    """the same bits whatever is recomputed, slower on a GPU; the other backends always give the same bits"""
    threads: int = 0
    """CPU threads; 0: physical cores"""
    recompute: Literal["none", "act", "act_norm", "block"] = "act"
    """what backward computes again instead of keeping it"""
    head_mib: int = 0
    """MiB of the head's logits that exist at a time; 0: the backend's own size"""
    seed: int = 1337
    """of initial weights, data order, dropout and sampling"""
    val_every: int = 250
    """steps between validations; 0: never. The last step is always validated if a validation set exists"""
    val_tokens: int = 65536
    """tokens of a validation; 0: the whole set"""
    hellaswag: str = ""
    """HellaSwag as `handgrad data hellaswag` makes it, or .jsonl: its accuracy by llm.c's rule goes into the log"""
    eval_every: int = 250
    """steps between evaluations on HellaSwag, and of nothing else; 0: only after the last step"""
    sample_every: int = 0
    """steps between samples; 0: only after the last step"""
    sample_tokens: int = 256
    """tokens of a sample; 0: no samples"""
    prompt: str = ""
    """start of every sample; empty: a line break, or the end-of-text token if the data cannot spell one"""
    save_every: int = 1000
    """steps between checkpoints; 0: only after the last step"""
    keep_last: int = 2
    """newest checkpoints that are kept; 0: all"""
    keep_every: int = 0
    """checkpoints at multiples of this step, itself one of --run.save-every, are never deleted; 0: none"""
    max_skipped: int = 10
    """updates in a row that may be skipped; one more ends the run"""
    skip_loss_z: float = 0.0
    """skip an update whose loss is this many standard deviations above the last 128; 0: never"""
    skip_grad_z: float = 0.0
    """the same for the gradient norm"""
    check: Literal["off", "nan"] = "off"
    """nan: check every output of every call and name the first that is not finite; slow"""
    tensorboard: bool = False
    """also write TensorBoard event files into the run folder"""
    wandb: str = ""
    """also send the figures to this project of Weights & Biases; empty: to none"""
    telemetry_every: int = 0
    """steps between looks at the GPU's load, power, temperature and clocks; 0: never"""

    def __post_init__(self) -> None:
        _check(self, "run", 1, "micro_batch")
        _check(self, "run", 0, "steps threads head_mib seed val_every val_tokens sample_every sample_tokens")
        _check(self, "run", 0, "eval_every save_every keep_last keep_every max_skipped skip_loss_z skip_grad_z")
        _check(self, "run", 0, "telemetry_every")
        if self.seed >= 2**63:
            raise HandgradError("run", "--run.seed is below 2^63", self.seed)
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            rule = f"--run.keep-every is a multiple of --run.save-every {self.save_every}"
            raise HandgradError("run", rule, self.keep_every)


@dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def _check(settings: Any, group: str, least: int, names: str) -> None:
    """Raises HandgradError unless every field is of its type, and the named ones are finite and at least `least`."""
    for name, kind in get_type_hints(type(settings)).items():
        value, flag = getattr(settings, name), f"--{group}.{name.replace('_', '-')}"
        if get_origin(kind) is Literal:
            rule = None if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"
        elif kind in (int, bool, str):
            rule = None if type(value) is kind else f"of type {kind.__name__}"
        else:
            rule = None if type(value) in (int, float, *get_args(kind)) else "a number"
        if rule is None and name in names.split() and not least <= value < math.inf:
            rule = f"a number from {least} on"
        if rule is not None:
            raise HandgradError(group, f"{flag} is {rule}", repr(value))
