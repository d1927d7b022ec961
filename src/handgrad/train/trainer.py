"""Trainer: one arena, the programs of a run bound to it, and what a loop calls: step, evaluate, generate, save."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.backends import open_backend
from handgrad.core.backward import POLICIES, backward
from handgrad.core.dtypes import DTYPES, F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.plan import Plan, plan
from handgrad.core.program import Call, Program
from handgrad.core.tensor import IGNORE_INDEX, Role
from handgrad.data import Tokens
from handgrad.infer import Engine, Sampling
from handgrad.infer.engine import record as record_engine
from handgrad.io import checkpoint
from handgrad.models import GPT2, batch
from handgrad.ops import add, cast
from handgrad.optim import AdamW
from handgrad.train.outliers import Outliers

HEAD_ROWS = 512  # rows of logits that exist at a time unless head_chunks says otherwise


def record_train(
    model: GPT2,
    optim: AdamW,
    micro_batch: int,
    seq_len: int,
    dtype: DType,
    recompute: str = "act",
    head_chunks: int = 0,
    accumulates: bool = False,
) -> Program:
    """The list of one step: forward, backward | norm | update | load.

    "load" turns float32 weights that lie in the gradients' memory into the working dtype; it runs once after a start.

    `accumulates`: a step has several micro-batches.
    """
    if recompute not in POLICIES:
        raise HandgradError("train", f"recompute is one of {', '.join(POLICIES)}", f"'{recompute}'")
    if seq_len > model.max_seq_len:
        raise HandgradError(
            "train",
            f"the model reads at most {model.max_seq_len} tokens",
            f"seq_len {seq_len}",
            hint="--model.max-seq-len",
        )
    p = Program(dtype, "train", accumulates)
    model.forward(p, batch(p, micro_batch, seq_len), chunks_of(micro_batch * seq_len, head_chunks))
    backward(p, add, drop=POLICIES[recompute])
    optim.record(p)
    if dtype is not F32:
        p.phase = "load"
        for bucket in p.buckets:
            with p.block(bucket.block, prefix=False):
                name = f"{bucket.block}.{'decay' if bucket.decay else 'plain'}"
                x, y, low = (
                    p.slice(flat, bucket.start, bucket.size, f"{name}.{flat}") for flat in ("grad", "param", "low")
                )
                p.emit(cast, x, into={"y": y, "low": low})
    return p


def record_loss(model: GPT2, micro_batch: int, seq_len: int, dtype: DType, head_chunks: int = 0) -> Program:
    """The list of one evaluation batch."""
    p = Program(dtype, "loss")
    model.forward(p, batch(p, micro_batch, seq_len), chunks_of(micro_batch * seq_len, head_chunks))
    return p


def chunks_of(rows: int, head_chunks: int) -> int:
    """The number of pieces of the head; 0 asks for pieces of at most HEAD_ROWS rows."""
    if head_chunks < 0 or head_chunks > rows:
        raise HandgradError("train", f"head_chunks lies between 1 and the {rows} rows of a micro-batch", head_chunks)
    return head_chunks or -(-rows // HEAD_ROWS)


def initialize(p: Program, arena: Any, seed: int) -> None:
    """Draws the initial weights in float32, each parameter from its own stream of the seed, where "load" finds them."""
    for i, info in enumerate(p.params.values()):
        target = arena.part("param" if p.dtype is F32 else "grad", info.tensor)
        rows = target if info.init.rows is None else target[: info.init.rows]
        target[...] = 1.0 if info.init.kind == "ones" else 0.0
        if info.init.kind == "normal":
            rng = np.random.default_rng([seed, i])
            for row in np.array_split(
                rows, max(1, rows.size // (1 << 17))
            ):  # small pieces, so that malloc keeps none of it
                row[...] = rng.standard_normal(row.shape, np.float32) * np.float32(info.init.std)


def shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What a checkpoint must hold to fill these arrays: name to (shape, dtype)."""
    return {name: (a.shape, a.dtype) for name, a in arrays.items()}


@dataclass(frozen=True)
class Step:
    """What a step did: mean loss in nats per token, gradient norm before clipping, why the update was skipped."""

    loss: float
    grad_norm: float
    skipped: str = ""


class Trainer:
    """Trains a model. Everything is planned, allocated and bound here; a step allocates no tensor.

    model, optim, data   what to train, how, on what; data.batch_tokens is one optimizer step
    micro_batch          sequences per forward and backward pass; a step accumulates as many as it needs
    backend              "cpu" or "ref"
    dtype                "f32", or "bf16", whose weights keep their low 16 bits beside them
    recompute            "none", "act", "act_norm" or "block"
    head_chunks          pieces of the head's logits; 0 for pieces of at most 512 rows
    val, sample          plan for evaluate() and for generate() too
    seed                 of the initial weights and of dropout
    skip_loss_z, skip_grad_z   z-scores above which an update is skipped; 0 for never

    >>> import handgrad as hg
    >>> data = hg.data.tokens(shards, seq_len=16, batch_tokens=64)
    >>> model = hg.models.GPT2(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    >>> run = hg.Trainer(model, hg.optim.AdamW(), data, micro_batch=4)
    >>> first = run.step(1, lr=1e-3)
    >>> round(first.loss, 1)
    4.6
    """

    def __init__(
        self,
        model: GPT2,
        optim: AdamW,
        data: Tokens,
        *,
        micro_batch: int,
        backend: str = "cpu",
        dtype: str = "f32",
        recompute: str = "act",
        head_chunks: int = 0,
        val: bool = True,
        sample: bool = True,
        seed: int = 0,
        threads: int = 0,
        out: str | Path | None = None,
        skip_loss_z: float = 0.0,
        skip_grad_z: float = 0.0,
        check: str = "off",
    ):
        rows = micro_batch * data.seq_len
        if micro_batch < 1 or data.batch_tokens % rows:
            raise HandgradError(
                "train",
                f"batch_tokens is a multiple of micro_batch x seq_len = {micro_batch} x {data.seq_len}",
                data.batch_tokens,
                hint="--data.batch-tokens, --run.micro-batch",
            )
        if dtype not in ("f32", "bf16"):
            raise HandgradError("train", "dtype is f32 or bf16", f"'{dtype}'")
        self._check_ids(model, data)
        self.model, self.optim, self.data, self.out = model, optim, data, None if out is None else Path(out)
        self.micro_batch, self.accumulation, self.check = micro_batch, data.batch_tokens // rows, check
        self.backend = open_backend(backend, threads)
        kind = DTYPES[dtype]
        train = record_train(
            model, optim, micro_batch, data.seq_len, kind, recompute, head_chunks, self.accumulation > 1
        )
        loss = record_loss(model, micro_batch, data.seq_len, kind, head_chunks) if val else None
        engine = record_engine(model, kind) if sample else ()
        self.program = train
        self.plan: Plan = plan(*(p for p in (train, loss, *engine) if p is not None), scratch=self.backend.scratch)
        self.arena = self.backend.alloc(self.plan)
        self._train = self.backend.bind(train, self.arena)
        self._loss = None if loss is None else self.backend.bind(loss, self.arena)
        self._engine = Engine(model, engine, self.arena, self.backend) if engine else None
        phases = [c.phase for c in train.calls]
        self._norm, self._update = phases.index("norm"), phases.index("update")
        self._load = phases.index("load") if "load" in phases else len(phases)
        self._knobs = self.arena.knobs(train)
        self._knobs.seed = seed
        self._outliers = {"loss": Outliers(skip_loss_z), "grad_norm": Outliers(skip_grad_z)}
        self.last_step = 0
        initialize(train, self.arena, seed)
        self._train.run(self._load)

    @staticmethod
    def _check_ids(model: GPT2, data: Tokens) -> None:
        """Has every batch checked against the vocabulary: a kernel would read past the embedding."""
        data.vocab_size = min(model.vocab_size, data.vocab_size or model.vocab_size)

    # training -------------------------------------------------------------------------------------------------------

    def step(self, step: int, lr: float) -> Step:
        """One optimizer step (counted from 1) at this learning rate. The data of a step depend on its number alone."""
        batches = [
            self.data.batch(step - 1, micro_batch=self.micro_batch, micro_step=k) for k in range(self.accumulation)
        ]
        counts = sum(int(np.count_nonzero(b["targets"] != IGNORE_INDEX)) for b in batches)
        self._knobs.step, self._knobs.lr, self._knobs.loss_scale = step, lr, 1.0 / max(counts, 1)
        total = 0.0
        for k, b in enumerate(batches):
            self._knobs.micro_step = k
            total += self._losses(self._train, self.program, b, self._norm)
        self._run(self._train, self._norm, self._update)
        loss, norm = total / max(counts, 1), float(self._knobs.grad_norm)
        skipped = self._judge(loss, norm)
        if not skipped:
            self._run(self._train, self._update, self._load)
        self.last_step = step
        return Step(loss, norm, skipped)

    def _judge(self, loss: float, norm: float) -> str:
        """Why this update must not happen, or nothing."""
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not np.isfinite(value):
                return f"{name} is {value}"
        scores = [outliers.add(value) for outliers, value in zip(self._outliers.values(), (loss, norm))]
        for (name, outliers), value, z in zip(self._outliers.items(), (loss, norm), scores):
            if z > outliers.limit > 0:
                return f"{name} {value:.4g} is {z:.1f} standard deviations above the last {len(outliers.window)}"
        return ""

    def trace(self, after: Callable[[Call, float], None]) -> None:
        """Runs a step on the inputs that lie in the arena, call by call; `after` sees each call and its seconds.

        The weights are updated as in any step.
        """
        self._knobs.micro_step = 0
        self._train.run_each(after, 0, self._load)

    def evaluate(self, data: Tokens, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token over the first `max_tokens` of `data` (all if None), whatever the batch size."""
        if self._loss is None:
            raise HandgradError("train", "evaluation is planned when the trainer is made", "val=False")
        if data.seq_len != self.data.seq_len:
            raise HandgradError("train", f"validation data has the run's seq_len {self.data.seq_len}", data.seq_len)
        self._check_ids(self.model, data)
        total, counts = 0.0, 0
        for b in data.sweep(self.micro_batch, max_tokens):
            total += self._losses(self._loss, self._loss.program, b, None)
            counts += int(np.count_nonzero(b["targets"] != IGNORE_INDEX))
        return total / max(counts, 1)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = Sampling(), stop_id: int | None = None
    ) -> Iterator[int]:
        """Yields token ids after `prompt` with the current weights. It uses the arena: finish before the next step."""
        if self._engine is None:
            raise HandgradError("train", "generation is planned when the trainer is made", "sample=False")
        return self._engine.generate(prompt, max_tokens, sampling, stop_id)

    def _losses(self, run: Any, p: Program, b: dict[str, np.ndarray], stop: int | None) -> float:
        """Runs one micro-batch; returns the sum of its losses."""
        for name, tensor in p.inputs.items():
            self.arena.view(tensor)[...] = b[name].reshape(-1)
        self._run(run, 0, stop)
        return float(self.arena.view(p.outputs["losses"]).sum(dtype=np.float64))

    def _run(self, run: Any, start: int, stop: int | None) -> None:
        if self.check == "nan":
            run.run_each(self._check_finite, start, stop)
        else:
            run.run(start, stop)

    def _check_finite(self, c: Call, seconds: float) -> None:
        for name, t in c.named_outs():
            room = name == "logits" and c.op.name != "linear"  # of a chunk: its padded columns hold anything
            if (
                not room
                and t.role is not Role.KNOB
                and t.dtype.unit
                and not np.isfinite(self.arena.view(t).astype(np.float32)).all()
            ):
                raise HandgradError(
                    "check",
                    "every output is finite",
                    f"a non-finite value in '{name}' of {c.phase} {c.op.name}",
                    context=f"block {c.block}, {c.where}",
                )

    # checkpoints ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, np.ndarray]:
        """Optimizer state by name: m.<parameter>, v.<parameter>, low.<parameter>."""
        flats = [flat for flat in self.plan.flats if flat not in ("param", "grad")]
        return {
            f"{flat}.{name}": self.arena.part(flat, info.tensor)
            for flat in flats
            for name, info in self.program.params.items()
        }

    def params(self) -> dict[str, np.ndarray]:
        """Views of the weights by name, in the working dtype."""
        return {name: self.arena.part("param", info.tensor) for name, info in self.program.params.items()}

    def grads(self) -> dict[str, np.ndarray]:
        """Views of the gradients by name, float32, before clipping. They hold until anything else runs."""
        return {name: self.arena.part("grad", info.tensor) for name, info in self.program.params.items()}

    def load_params(self, params: dict[str, np.ndarray]) -> None:
        """Replaces the weights, in float32 precision, by arrays of the same names and shapes."""
        mine = {name: info.tensor for name, info in self.program.params.items()}
        if set(params) != set(mine):
            raise HandgradError("train", f"weights are {len(mine)} named arrays", sorted(set(params) ^ set(mine))[:3])
        for name, t in mine.items():
            if params[name].shape != t.shape:
                raise HandgradError("train", f"'{name}' has shape {t.shape}", params[name].shape)
            self.arena.part("param" if self.program.dtype is F32 else "grad", t)[...] = params[name]
        self._train.run(self._load)

    def save(self, step: int, config: dict[str, Any] | None = None, keep_last: int = 0, keep_every: int = 0) -> Path:
        """Writes a complete checkpoint of this step into the run folder; returns its path.

        keep_last: newest checkpoints that are kept, 0 for all;  keep_every: multiples of this step are never deleted
        """
        meta = {
            "step": step,
            "model": asdict(self.model),
            "dtype": self.program.dtype.name,
            "stored": next(iter(self.params().values())).dtype.name,  # float64 where the ref backend trained
            "config": config or {},
            "outliers": {name: list(o.window) for name, o in self._outliers.items()},
            "versions": {name: version(name) for name in ("handgrad", "numpy", "safetensors")},
        }
        kept = {"keep_last": keep_last or sys.maxsize, "keep_every": keep_every}
        return checkpoint.save(self._folder(), step, self.params(), self._state(), meta, **kept)

    def resume(self) -> int:
        """Continues from the newest complete checkpoint of the run folder; returns its step, 0 if there is none."""
        path = checkpoint.newest(self._folder())
        if path is None:
            return 0
        saved = checkpoint.load_meta(path, {"model": dict, "dtype": str, "outliers": dict})
        for key, value in asdict(self.model).items():
            if saved["model"].get(key) != value:
                raise HandgradError(
                    "resume",
                    f"the checkpoint's model has {key} {saved['model'].get(key)}",
                    value,
                    context=str(path),
                    hint="another --run.out, or the flags of the first run",
                )
        if saved["dtype"] != self.program.dtype.name:
            raise HandgradError(
                "resume", f"the checkpoint was trained in {saved['dtype']}", self.program.dtype.name, hint="--run.dtype"
            )
        params, state = self.params(), self._state()
        pairs = [(params, checkpoint.load(path, shapes(params))), (state, checkpoint.load_state(path, shapes(state)))]
        for target, source in pairs:
            for name, array in target.items():
                array[...] = source[name]
        for name, outliers in self._outliers.items():
            outliers.window.clear()
            outliers.window.extend(saved["outliers"].get(name, ()))
        self.last_step = saved["step"]
        return self.last_step

    def _folder(self) -> Path:
        if self.out is None:
            raise HandgradError(
                "train", "a trainer that saves has a run folder", "out=None", hint="Trainer(..., out='runs/name')"
            )
        return self.out
