"""The settings of a run: groups of flags, with the defaults of the Shakespeare recipe.

No two settings have the same name, so a flag needs no group: --steps. What is 0, None or empty is resolved from the
rest (resolve.py); the result is saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.number import I64_MAX, real, whole

PACKAGED = "shakespeare"  # the word for the text in the package
THOUSANDS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
OTHER_WORDS = {"gpu": "cuda", "float": "f32"} | dict.fromkeys(("fp16", "float16", "half", "bfloat16"), "bf16")
# a preset's, of which each may be set alone
SIZES = ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "head_size", "mlp_size", "max_seq_len")
DERIVED_SIZES = ("num_kv_heads", "head_size", "mlp_size")  # where they are 0, the others give them

ScheduleName = Literal[
    "cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial", "step", "cosine_with_restarts"
]  # handgrad.optim.schedules.SCHEDULES
STEPS = 2000  # of a run whose length is not given
SCHEDULE_SETTINGS = ("cooldown", "cooldown_shape", "power", "cycles", "decay_every", "decay_factor")
OptimizerName = Literal["adamw", "muon", "sgd", "lion", "adafactor", "schedule_free"]  # handgrad.optim.OPTIMIZERS
SCHEDULE_FREE = "schedule_free"  # the one that needs no decay of the learning rate


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    family: str = ""
    """architecture: bert, gemma, gpt2, llama, gpt_neox, t5; empty: the preset's"""
    preset: str = "tiny"
    """tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, d6 .. d84 (or any d<layers>), gpt3:c384 .. gpt3:c12288,
    llama3.2-1b, llama3.1-8b, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen3-0.6b, gemma3-270m,
    bert-base, pythia-70m, pythia-160m, pythia-410m, t5-small, t5-base, t5-v1.1-small, t5-v1.1-base"""
    depth: int = 0
    """number of layers, width 64 per layer; replaces the preset"""
    num_layers: int = 0
    """layers; 0: the preset's"""
    num_heads: int = 0
    """attention heads; 0: the preset's"""
    num_kv_heads: int = 0
    """heads of keys and values, of a Llama; 0: the preset's"""
    hidden_size: int = 0
    """width; 0: the preset's"""
    head_size: int = 0
    """width of a head, of a Llama or T5; 0: the preset's"""
    mlp_size: int = 0
    """width of the MLP, of all but a GPT-2; 0: the preset's"""
    max_seq_len: int = 0
    """longest sequence, tokens, and of a T5 the source; 0: the preset's"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: the data's, and the model's special tokens that it lacks"""
    dropout: float = 0.0
    """probability of dropping embeddings, attention weights and branches, of a GPT-2, BERT or T5"""
    tie_embeddings: bool = True
    """use the token embedding as the head, if the preset does"""
    init: str = "random"
    """start weights: random (of --seed), llmc (those of llm.c, seed 42), or a model on disk, with its sizes"""

    def __post_init__(self) -> None:
        _check(self, 0, " ".join(("depth", *SIZES, "vocab_size")))


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    train: str = PACKAGED
    """a folder of `handgrad data`, a glob of .bin shards, or 'shakespeare', in the package; A,B: a mixture"""
    mix: str = ""
    """ratio of the sequences from the sets of --train, such as 3,1; empty: equal shares"""
    val: str = ""
    """glob of validation shards; empty: the folder's own"""
    seq_len: int = 0
    """tokens in a training sequence; 0: the model's longest, 2048 at most for a Llama, a T5's targets"""
    batch_tokens: int = 0
    """tokens in an optimizer step; 0: one micro-batch. More accumulates gradients"""
    shuffle: bool = True
    """visit the sequences in random order"""
    documents: bool = False
    """attention stays within documents, which begin with the end-of-text id; in chat data always within rows"""
    packing: Literal["best_fit", "none"] = "best_fit"
    """of chat data: best_fit: as many whole rows in a training sequence as fit; none: one, and padding"""
    overfit: bool = False
    """train on the first batch in every step, to see whether the model can memorise it"""
    whole_word: bool = False
    """of a BERT: mask whole words, whose later pieces begin with ##"""

    def __post_init__(self) -> None:
        _check(self, 0, "seq_len batch_tokens")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "adamw"
    """update rule; docs/optimizers.md compares them"""
    lr: float = 2e-3
    """peak learning rate"""
    beta1: float = 0.9
    """decay of the first moment; of schedule_free: share of the average in the weights that train"""
    beta2: float = 0.99
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float | None = None
    """of matrices and embeddings, not of biases and norms; None: lion 1, sgd and adafactor 0, others 0.1"""
    embedding_decay: float | None = None
    """of muon: weight decay of embeddings and heads; None: --weight-decay"""
    moments: Literal["f32", "bf16", "int8"] = "f32"
    """of adamw: type of both moments; they take 8, 4 or 2.06 bytes a parameter"""
    momentum: float | None = None
    """of muon's matrices and of sgd, which keeps no state for 0; None: the optimizer's own"""
    nesterov: bool = False
    """of sgd: Nesterov momentum"""
    scale_parameter: bool | None = None
    """of adafactor and adamw: scale a parameter's step by its RMS; None: only adafactor does"""
    relative_step: bool = False
    """of adafactor: the learning rate of step t is at most 1 / sqrt(t)"""
    matrix_rate: float = 1.0
    """of muon: the learning rate of hidden matrices, as a multiple of --lr"""
    matrix_scale: Literal["adamw", "aspect"] = "adamw"
    """of muon: size of a step; adamw: 0.2 sqrt(max(m, n)), which keeps AdamW's rate; aspect: sqrt(max(1, m/n))"""
    orthogonalize: Literal["polar_express", "newton_schulz"] = "polar_express"
    """of muon: the polynomials that orthogonalise the momentum"""
    row_scale: bool = False
    """of muon: normalise the rows before orthogonalising (MuonEq)"""
    rescale: bool = False
    """of muon: scale the orthogonalised step to the norm of an orthogonal matrix (Muon+)"""
    second_beta: float = 0.0
    """of muon: decay of a second moment of each row or column, which evens out the step (NorMuon); 0: none"""
    cautious: bool = False
    """of muon: decay matrices only where the step shrinks the weight"""
    per_head: bool = False
    """of muon: orthogonalise q, k and v head by head"""
    clip: float = 1.0
    """largest global gradient norm; 0: no clipping"""
    schedule: ScheduleName | None = None
    """shape of the learning rate after warm-up; None: cosine, and constant for schedule_free"""
    warmup: int | float | None = None
    """warm-up steps or, below 1, a fraction of all steps; None: 100, or a tenth of a run shorter than 1000"""
    final: float | None = None
    """last learning rate as a fraction of the peak; None: 0.1 for the cosines, 1 for constant, else 0"""
    cooldown: int | float | None = None
    """of wsd: steps of the cooldown or, below 1, a fraction of all steps; None: 0.2"""
    cooldown_shape: Literal["sqrt", "linear", "cosine"] | None = None
    """of wsd: shape of the cooldown; sqrt is 1 - sqrt(r); None: sqrt"""
    power: float | None = None
    """of polynomial: exponent; None: 2"""
    cycles: int | None = None
    """of cosine_with_restarts: number of cosines; None: 4"""
    decay_every: int | float | None = None
    """of step: steps between drops of the rate or, below 1, a fraction of all steps; None: 0.25"""
    decay_factor: float | None = None
    """of step: factor of each drop; None: 0.1"""
    momentum_warmup: int | float = 0
    """steps, or a fraction of all, over which momentum rises from 0.85 to the optimizer's own; 0: none"""
    momentum_cooldown: int | float = 0
    """last steps, or a fraction of all, over which momentum falls back to 0.85; 0: none"""
    ema: float = 0.0
    """decay of a moving average of the weights, such as 0.999, for --ema of eval, generate, convert; 0: none"""
    max_skipped: int = 10
    """updates in a row that may be skipped; one more ends the run"""
    skip_loss_z: float = 0.0
    """skip an update whose loss is this many standard deviations above the last 128; 0: never"""
    skip_grad_z: float = 0.0
    """the same for the gradient norm"""

    def __post_init__(self) -> None:
        lengths = "warmup cooldown decay_every momentum_warmup momentum_cooldown"
        _check(self, 0, f"lr final max_skipped skip_loss_z skip_grad_z power cycles decay_factor ema {lengths}")


@dataclass(frozen=True)
class TuneConfig:
    """Which parameters learn; the others are frozen, without gradients and optimizer state."""

    train_only: str = ""
    """name patterns of the parameters to train, such as 'h.11.*,ln_f.*'; empty: all"""
    lora_rank: int = 0
    """train low-rank adapters of this rank beside the frozen model; 0: none"""
    lora_alpha: float = 16.0
    """an adapter's output is scaled by alpha / rank"""
    lora_targets: str = "all-linear"
    """linears with adapters, by transformers' names, such as q,k,v,o,gate,up,down or c_attn"""
    lora_dropout: float = 0.0
    """dropout of the inputs of adapters"""
    lora_init: str = ""
    """folder of an adapter saved by peft, to start from; it sets rank, alpha, targets and dropout"""

    def __post_init__(self) -> None:
        _check(self, 0, "lora_rank lora_alpha lora_dropout")
        if not self.lora_rank and not self.lora_init:
            for name in ("lora_alpha", "lora_targets", "lora_dropout"):
                if getattr(self, name) != getattr(TuneConfig, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise HandgradError("tune", f"{flag} goes with --lora-rank", repr(getattr(self, name)))
        if self.train_only and (self.lora_rank or self.lora_init):
            raise HandgradError("tune", "--train-only goes without adapters, which alone learn", self.train_only)


@dataclass(frozen=True)
class RunConfig:
    """Length, run folder, seed."""

    steps: int | None = None
    """optimizer steps; 0: one epoch; None: 2000, unless --tokens or --epochs gives the length"""
    tokens: str = ""
    """length in tokens instead, such as 1B, 300M or 250000, rounded down to whole steps"""
    epochs: float = 0.0
    """length in epochs instead"""
    out: str = ""
    """run folder; empty: runs/<data>-NNN, the next free number"""
    resume: str = ""
    """run folder whose newest complete checkpoint to resume; auto: the one in --out, or a new run"""
    extend: bool = False
    """with --resume and more --steps: continue from before the wsd cooldown; cooled checkpoints are set aside"""
    fresh_optimizer: bool = False
    """with --resume: keep the weights and reset the optimizer's state; --optimizer may differ"""
    seed: int = 1337
    """seed of initial weights, data order, dropout and sampling"""
    check: Literal["off", "nan"] = "off"
    """nan: check every output of every call and name the first that is not finite; slow"""
    config: str = ""
    """settings from a file: a run's config.json, or names and values in .json, .yaml or .toml. Flags override it"""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, int | float):  # from a file
            object.__setattr__(self, "tokens", f"{self.tokens:.0f}" if self.tokens else "")
        _check(self, 0, "steps epochs seed")
        lengths = {"--steps": self.steps, "--tokens": self.tokens, "--epochs": self.epochs}
        given = [f"{flag} {value}" for flag, value in lengths.items() if value or (flag == "--steps" and value == 0)]
        if len(given) > 1:
            raise HandgradError("run", "the length of a run is one of --steps, --tokens and --epochs", " ".join(given))
        if self.tokens:
            num_tokens(self.tokens)
        for name in ("extend", "fresh_optimizer"):
            if getattr(self, name) and not self.resume:
                flag = f"--{name.replace('_', '-')}"
                raise HandgradError("run", f"{flag} goes with --resume RUN", "a new run")
        if self.seed >= 2**63:
            raise HandgradError("run", "--seed is below 2^63", self.seed)


@dataclass(frozen=True)
class ComputeConfig:
    """Backend, precision and memory of a step."""

    micro_batch: int = 12
    """sequences in one forward and backward pass"""
    backend: Literal["auto", "cpu", "cuda", "ref"] = "auto"
    """auto: cuda where there is a GPU, else cpu; cpu: C kernels; ref: numpy in float64, slow"""
    threads: int = 0
    """CPU threads; 0: the physical cores that this process may use"""
    dtype: Literal["auto", "f32", "tf32", "bf16"] = "auto"
    """working dtype; tf32: float32 with TF32 matmuls on a GPU; auto: bf16 where the hardware multiplies it"""
    master_weights: bool = True
    """bf16 weights keep the low 16 bits of their float32; without, updates are rounded stochastically"""
    grad_dtype: Literal["f32", "bf16"] = "f32"
    """dtype of parameter gradients; bf16 needs a GPU"""
    recompute: Literal["none", "act", "act_norm", "block"] = "act"
    """outputs that backward recomputes: act: activation functions; act_norm: norms too; block: all but block inputs"""
    zero: Literal[0, 1, 2, 3] = 1
    """what ranks shard: 1 the optimizer state, 2 gradients too, 3 parameters too; 0: nothing"""
    head_mib: int = 0
    """MiB of logits in one chunk of the head; 0: the backend's default"""
    deterministic: bool = False
    """the same bits whatever is recomputed, slower on a GPU; the other backends always give the same bits"""

    def __post_init__(self) -> None:
        _check(self, 1, "micro_batch")
        _check(self, 0, "threads head_mib")


@dataclass(frozen=True)
class RanksConfig:
    """Several ranks: processes that train together, one a GPU. It belongs to a command, not to the run."""

    ranks: int = 0
    """ranks that this command starts on this machine (--gpus: on its GPUs); 0: the launcher's, or one"""
    rank: int | None = None
    """this process's rank, from 0, where each rank has its own command; None: one command starts them all"""
    ranks_per_machine: int = 0
    """with --rank: ranks on each machine; 0: all ranks are on one"""
    rendezvous: str = ""
    """where ranks on several machines meet: HOST:PORT of rank 0, or a file that all see"""

    def __post_init__(self) -> None:
        _check(self, 0, "ranks rank ranks_per_machine")


@dataclass(frozen=True)
class EvalConfig:
    """Validation, HellaSwag and samples during training."""

    val_every: int = 250
    """steps between validations; 0: only after the last step"""
    val_tokens: int = 65536
    """tokens of a validation; 0: the whole set"""
    patience: int = 0
    """end the run after this many validations in a row without a lower loss; 0: never"""
    hellaswag: str = ""
    """HellaSwag as `handgrad data hellaswag` makes it, or .jsonl: its accuracy by llm.c's rule goes into the log"""
    eval_every: int = 250
    """steps between HellaSwag evaluations; 0: only after the last step"""
    sample_every: int = 0
    """steps between samples; 0: only after the last step"""
    sample_tokens: int = 256
    """tokens of a sample; 0: no samples"""
    prompt: str = ""
    """start of every sample; empty: a line break, or the end-of-text token if the data cannot spell one; of chats what
    asks for the first reply of the validation rows"""

    def __post_init__(self) -> None:
        _check(self, 0, "val_every val_tokens patience eval_every sample_every sample_tokens")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    save_every: int = 1000
    """steps between checkpoints; 0: only after the last step"""
    keep_last: int = 2
    """newest checkpoints to keep; 0: all. The one before a wsd cooldown is kept, too"""
    keep_best: bool = False
    """keep the checkpoint with the lowest validation loss, as RUN/best"""
    keep_every: int = 0
    """checkpoints at multiples of this step, itself one of --save-every, are never deleted; 0: none"""

    def __post_init__(self) -> None:
        _check(self, 0, "save_every keep_last keep_every")
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            rule = f"--keep-every is a multiple of --save-every {self.save_every}"
            raise HandgradError("checkpoint", rule, self.keep_every)


@dataclass(frozen=True)
class LogConfig:
    """What is shown, and where else the figures go."""

    verbose: bool = False
    """print all settings before the first step"""
    tensorboard: bool = False
    """also write TensorBoard event files into the run folder"""
    wandb: str = ""
    """also send the figures to this project of Weights & Biases; empty: to none"""
    telemetry_every: int = 0
    """steps between readings of the GPU's load, power, temperature and clocks; 0: never"""

    def __post_init__(self) -> None:
        _check(self, 0, "telemetry_every")


@dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    run: RunConfig = field(default_factory=RunConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def from_names(values: Mapping[str, Any]) -> Config:
    """The settings with these values by name, the others at their defaults. Raises HandgradError for unknown names.

    >>> from_names({"steps": 10, "lr": 1e-3}).optim.lr
    0.001
    """
    left, groups = dict(values), {}
    for name, kind in get_type_hints(Config).items():
        groups[name] = kind(**{f.name: left.pop(f.name) for f in fields(kind) if f.name in left})
    for unknown in left:
        raise HandgradError("config", "settings are the flags of handgrad train", f"'{unknown}'")
    return Config(**groups)


def by_group(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by group from settings by name; values that are no settings are left out."""
    groups = {name: [f.name for f in fields(kind)] for name, kind in get_type_hints(Config).items()}
    return {group: {name: values[name] for name in names if name in values} for group, names in groups.items()}


def words_of(kind: Any) -> tuple[Any, ...]:
    """The words of a Literal, which may be None besides; none of another type."""
    return next((get_args(one) for one in (kind, *get_args(kind)) if get_origin(one) is Literal), ())


def num_tokens(text: str) -> int:
    """The number in `--tokens`: digits, with k, M, B or T for a thousand to a million million.

    >>> num_tokens("1B"), num_tokens("2.5m"), num_tokens("4096")
    (1000000000, 2500000, 4096)
    """
    digits, factor = text.strip(), 1
    if digits[-1:].upper() in THOUSANDS:
        digits, factor = digits[:-1], THOUSANDS[digits[-1:].upper()]
    try:
        found = float(digits) * factor
    except ValueError:
        found = 0.0
    if not 1 <= found <= I64_MAX:
        raise HandgradError("run", "--tokens is a number such as 1B, 300M or 250000", f"'{text}'")
    return round(found)


def _check(settings: Any, least: int, names: str) -> None:
    """Raises HandgradError unless every field is of its type, and numbers are finite and, if named, at
    least `least`.

    Numbers of numpy become Python's, which a checkpoint can keep.
    """
    group = type(settings).__name__.removesuffix("Config").lower()
    bounds = dict.fromkeys(names.split(), least)
    for name, kind in get_type_hints(type(settings)).items():
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        words = words_of(kind)
        kinds = get_args(kind) or (kind,)
        if value is None and type(None) in kinds:
            continue
        elif words:
            if value not in words:
                named = [str(word) for word in words]
                hint = did_you_mean(str(value), named, OTHER_WORDS)
                raise HandgradError(group, f"{flag} is one of {', '.join(named)}", repr(value), hint=hint)
        elif {int, float} <= set(kinds):  # a number of steps, or a fraction of them
            number = real(group, flag, value, bounds.get(name))
            is_fraction = 0 < number < 1
            count = int(number) if isinstance(value, float) and number.is_integer() else value
            object.__setattr__(settings, name, number if is_fraction else whole(group, flag, count))
        elif float in kinds:
            object.__setattr__(settings, name, real(group, flag, value, bounds.get(name)))
        elif int in kinds:
            object.__setattr__(settings, name, whole(group, flag, value, bounds.get(name, -I64_MAX)))
        elif type(value) not in kinds:
            raise HandgradError(group, f"{flag} is of type {kinds[0].__name__}", repr(value))
