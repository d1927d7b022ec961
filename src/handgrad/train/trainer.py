"""Trainer: one arena, the programs of a run bound to it, and what a loop calls: step, evaluate, generate, save."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.backends import open_backend
from handgrad.backends.base import Executable
from handgrad.core.dtypes import DTYPES, F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY, Call, MicroBatch
from handgrad.core.plan import Plan
from handgrad.core.program import Segment
from handgrad.core.tensor import IGNORE_INDEX, Role
from handgrad.data import Tokens
from handgrad.evals import Scorer
from handgrad.evals import record as record_scorer
from handgrad.infer import Engine, Sampling
from handgrad.infer.engine import record as record_engine
from handgrad.io import checkpoint
from handgrad.io.weights import Weights
from handgrad.models import GPT2
from handgrad.optim import AdamW
from handgrad.train.outliers import Outliers
from handgrad.train.record import chunks_of, drawing, initialize, record_loss, record_train, write_weight


def shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What a checkpoint must hold to fill these arrays: name to (shape, dtype)."""
    return {name: (a.shape, a.dtype) for name, a in arrays.items()}


class Step:
    """What a step did. Where a device computes it, the values are awaited when they are first looked at.

    loss: mean, in nats per token;  grad_norm: global L2 norm before clipping;  skipped: why there was no update, or ""
    skips: how many updates in a row have been skipped, this one included
    """

    def __init__(self, finish: Callable[[], tuple[float, float, str, int]]):
        self._finish, self._values = finish, None

    def _wait(self) -> tuple[float, float, str, int]:
        if self._values is None:
            self._values = self._finish()
        return self._values

    @property
    def loss(self) -> float:
        return self._wait()[0]

    @property
    def grad_norm(self) -> float:
        return self._wait()[1]

    @property
    def skipped(self) -> str:
        return self._wait()[2]

    @property
    def skips(self) -> int:
        return self._wait()[3]


class Trainer:
    """Trains a model. Everything is planned, allocated and bound here; a step allocates no tensor.

    model, optim, data   what to train, how, on what; data.batch_tokens is one optimizer step
    micro_batch          sequences per forward and backward pass; a step accumulates as many as it needs
    backend              "auto" (cuda where there is a GPU, else cpu), "cpu", "cuda" or "ref"
    dtype                "f32", "tf32" (float32 whose products round their factors to 10 bits, on a GPU), or "bf16"
    master_weights       a bf16 weight keeps the low 16 bits of its float32; without, updates are rounded at random
    grad_dtype           of parameter gradients: "f32", or "bf16" on a GPU
    deterministic        the same bits whatever is recomputed, on a GPU at some cost; elsewhere always
    recompute            "none", "act", "act_norm" or "block"
    head_chunks          pieces of the head's logits; 0 for the backend's own size of a piece
    val, sample, score   plan for evaluate(), for generate() and for `scorer` (handgrad.evals) too
    seed                 of the initial weights and of dropout
    init                 the initial weights: "random", "llmc", or Weights as `infer.load.open_source` reads them
    skip_loss_z, skip_grad_z   z-scores above which an update is skipped; 0 for never
    overfit              every step takes the data of the first

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
        master_weights: bool = True,
        grad_dtype: str = "f32",
        deterministic: bool = False,
        recompute: str = "act",
        head_chunks: int = 0,
        val: bool = True,
        sample: bool = True,
        score: bool = False,
        seed: int = 0,
        init: str | Weights = "random",
        threads: int = 0,
        out: str | Path | None = None,
        skip_loss_z: float = 0.0,
        skip_grad_z: float = 0.0,
        check: str = "off",
        overfit: bool = False,
    ):
        rows = micro_batch * data.seq_len
        if micro_batch < 1 or data.batch_tokens % rows:
            raise HandgradError(
                "train",
                f"batch_tokens is a multiple of micro_batch x seq_len = {micro_batch} x {data.seq_len}",
                data.batch_tokens,
                hint="--data.batch-tokens, --run.micro-batch",
            )
        self._check_ids(model, data)
        self.model, self.optim, self.data, self.out = model, optim, data, None if out is None else Path(out)
        self.micro_batch, self.accumulation, self.check = micro_batch, data.batch_tokens // rows, check
        if init == "random":  # drawn while a GPU is opened and bound; any program of the model tells its parameters
            halves = dtype == "bf16" and master_weights
            init = drawing(record_loss(model, 1, 1, F32, chunks=1), seed, halves)
        self.backend = open_backend(backend, threads, tf32=dtype == "tf32", deterministic=deterministic)
        for name, value, known in (
            ("dtype", dtype, self.backend.dtypes),
            ("grad_dtype", grad_dtype, self.backend.grad_dtypes),
        ):
            if value not in known:
                rule = f"{name} is {' or '.join(known)} on the {self.backend.name} backend"
                raise HandgradError("train", rule, f"'{value}'")
        kind = F32 if dtype == "tf32" else DTYPES[dtype]
        chunks = chunks_of(rows, head_chunks, self.backend.head_rows)
        self.program = train = record_train(
            model,
            optim,
            micro_batch,
            data.seq_len,
            kind,
            chunks=chunks,
            recompute=recompute,
            accumulates=self.accumulation > 1,
            grad_dtype=DTYPES[grad_dtype],
            master=master_weights,
        )
        loss = record_loss(model, micro_batch, data.seq_len, kind, chunks) if val else None
        engine = record_engine(model, kind) if sample else ()
        scorer = record_scorer(model, kind, rows) if score else ()
        self.plan: Plan = self.backend.plan(*(p for p in (train, loss, *engine, *scorer) if p is not None))
        self.arena = self.backend.alloc(self.plan)
        self._train = self.backend.bind(train, self.arena)
        self._loss = None if loss is None else self.backend.bind(loss, self.arena)
        self._engine = Engine(model, engine, self.arena, self.backend) if engine else None
        self.scorer = Scorer(model, scorer, self.arena, self.backend) if scorer else None
        self._outliers = {"loss": Outliers(skip_loss_z), "grad_norm": Outliers(skip_grad_z)}
        self._pending: Step | None = None  # the last step, whose values may still be on their way
        self._writer = checkpoint.Writer()
        self._skips, self._overfit = 0, overfit
        self.last_step = 0
        self.arena.write_scalars(train, seed=seed)
        initialize(train, self.arena, seed, init)

    @staticmethod
    def _check_ids(model: GPT2, data: Tokens) -> None:
        """Has every batch checked against the vocabulary: a kernel would read past the embedding."""
        data.vocab_size = min(model.vocab_size, data.vocab_size or model.vocab_size)

    # training -------------------------------------------------------------------------------------------------------

    def step(self, step: int, lr: float) -> Step:
        """One optimizer step (counted from 1) at this learning rate. The data of a step depend on its number alone."""
        at = 0 if self._overfit else step - 1
        batches = [self.data.batch(at, micro_batch=self.micro_batch, micro_step=k) for k in range(self.accumulation)]
        counts = max(sum(int(np.count_nonzero(b["targets"] != IGNORE_INDEX)) for b in batches), 1)
        self.arena.write_scalars(self.program, step=step, lr=lr, loss_scale=1.0 / counts)
        segments = self.program.segments
        for k, b in enumerate(batches):
            self.arena.write_scalars(self.program, micro_step=k)
            micro_batch = MicroBatch(first=k == 0, last=k + 1 == len(batches))
            self._start(self._train, b, segments.forward_backward, micro_batch)
        if self._pending is not None:
            self._pending.loss  # noqa: B018  in the order of steps, and no more than one is on its way
        if not self.backend.is_asynchronous:  # a checkpoint is read where the weights lie
            self._writer.wait_until_read()
        if any(o.limit > 0 for o in self._outliers.values()):  # the host decides on the update
            self._run(self._train, segments.norm)
        else:  # the norm's kernel does: it knows what is not finite
            self._run(self._train, segments.norm_update)
        scalars = self.arena.fetch_scalars(self.program)

        def finish() -> tuple[float, float, str, int]:
            loss, norm = float(scalars().loss_sum) / counts, float(scalars().grad_norm)
            skipped = self._judge(loss, norm)
            self._skips = self._skips + 1 if skipped else 0
            return loss, norm, skipped, self._skips

        self._pending = result = Step(finish)
        self.last_step = step
        if any(o.limit > 0 for o in self._outliers.values()) and not result.skipped:
            self._run(self._train, segments.update)
        return result

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
        self._writer.wait_until_read()
        self.arena.write_scalars(self.program, micro_step=0)
        self._train.run_each(after)

    def evaluate(self, data: Tokens, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token over the first `max_tokens` of `data` (all if None), whatever the batch size."""
        if self._loss is None:
            raise HandgradError("train", "evaluation is planned when the trainer is made", "val=False")
        if data.seq_len != self.data.seq_len:
            raise HandgradError("train", f"validation data has the run's seq_len {self.data.seq_len}", data.seq_len)
        self._check_ids(self.model, data)
        total, counts = 0.0, 0
        for b in data.sweep(self.micro_batch, max_tokens):
            self._start(self._loss, b)
            total += float(self.arena.fetch_scalars(self._loss.program)().loss_sum)
            counts += int(np.count_nonzero(b["targets"] != IGNORE_INDEX))
        return total / max(counts, 1)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = Sampling(), stop_id: int | None = None
    ) -> Iterator[int]:
        """Yields token ids after `prompt` with the current weights. It uses the arena: finish before the next step."""
        if self._engine is None:
            raise HandgradError("train", "generation is planned when the trainer is made", "sample=False")
        return self._engine.generate(prompt, max_tokens, sampling, stop_id)

    def _start(
        self,
        run: Executable,
        batch: dict[str, np.ndarray],
        segment: Segment | None = None,
        micro_batch: MicroBatch = ONLY,
    ) -> None:
        """Starts one micro-batch."""
        for name, tensor in run.program.inputs.items():
            self.arena.write(tensor, batch[name].reshape(-1))
        self._run(run, segment, micro_batch)

    def _run(self, run: Executable, segment: Segment | None, micro_batch: MicroBatch = ONLY) -> None:
        if self.check == "nan":
            run.run_each(self._check_finite, segment, micro_batch)
        else:
            run.run(segment, micro_batch)

    def _check_finite(self, c: Call, seconds: float) -> None:
        for name, t in c.named_outs():
            if (
                name not in c.op.undefined.split()
                and t.role is not Role.SCALARS
                and t.dtype.unit
                and not np.isfinite(self.arena.read(t).astype(np.float32)).all()
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
        flats = [flat for flat in self.plan.vectors if flat not in ("param", "grad")]
        return {
            f"{flat}.{name}": self.arena.read_part(flat, info.tensor)
            for flat in flats
            for name, info in self.program.params.items()
            if self.plan.vectors[flat].covers(info.tensor)
        }

    def tokens(self, step: int) -> int:
        """Tokens that have been read when a step is done."""
        return (self.data.ahead + step * self.data.sequences) * self.data.seq_len

    def params(self) -> dict[str, np.ndarray]:
        """The weights by name, in the working dtype; on the host, views of them."""
        return {name: self.arena.read_part("param", info.tensor) for name, info in self.program.params.items()}

    def grads(self) -> dict[str, np.ndarray]:
        """The gradients by name, before clipping; on the host, views. They hold until anything else runs."""
        return {name: self.arena.read_part("grad", info.tensor) for name, info in self.program.params.items()}

    def load_params(self, params: dict[str, np.ndarray]) -> None:
        """Replaces the weights, in float32 precision, by arrays of the same names and shapes."""
        self._writer.wait_until_read()
        mine = {name: info.tensor for name, info in self.program.params.items()}
        if set(params) != set(mine):
            raise HandgradError("train", f"weights are {len(mine)} named arrays", sorted(set(params) ^ set(mine))[:3])
        for name, t in mine.items():
            if params[name].shape != t.shape:
                raise HandgradError("train", f"'{name}' has shape {t.shape}", params[name].shape)
            write_weight(self.arena, t, params[name])

    def save(
        self,
        step: int,
        config: dict[str, Any] | None = None,
        keep_last: int = 0,
        keep_every: int = 0,
        wait: bool = True,
    ) -> None:
        """Writes a complete checkpoint of this step into the run folder.

        keep_last: newest checkpoints that are kept, 0 for all;  keep_every: multiples of this step are never deleted
        wait: False returns at once, and what goes wrong is raised by a later step, save or `wait_saved`. On the host
            the weights are read where they lie, and the next update waits for that; of a card's a copy is made
        """
        self.wait_saved()  # before there is a copy of another
        if self._pending is not None:
            self._pending.loss  # noqa: B018  what it says of outliers belongs to the checkpoint
        meta = {
            "step": step,
            "model": asdict(self.model),
            "dtype": self.program.dtype.name,
            "stored": next(iter(self.params().values())).dtype.name,  # float64 where the ref backend trained
            "config": config or {},
            "tokens": self.tokens(step),
            "outliers": {name: list(o.window) for name, o in self._outliers.items()},
            "skips": self._skips,
            "versions": {name: version(name) for name in ("handgrad", "numpy", "safetensors")},
        }
        kept = {"keep_last": keep_last or sys.maxsize, "keep_every": keep_every}
        self._writer.save(self._folder(), step, self.params(), self._state(), meta, **kept)
        if wait:
            self.wait_saved()

    def wait_saved(self) -> None:
        """Waits until the last checkpoint is complete; raises what went wrong."""
        self._writer.wait()

    def resume(self) -> int:
        """Continues from the newest complete checkpoint of the run folder; returns its step, 0 if there is none."""
        self.wait_saved()
        path = checkpoint.newest(self._folder())
        if path is None:
            return 0
        kinds = {"model": dict, "dtype": str, "tokens": int, "outliers": dict, "skips": int}
        saved = checkpoint.load_meta(path, kinds)
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
        weights = checkpoint.load(path, shapes(self.params()))
        state = checkpoint.load_state(path, shapes(self._state()))
        for key, values in ({f"param.{name}": w for name, w in weights.items()} | dict(state)).items():
            flat, _, name = key.partition(".")
            self.arena.write_part(flat, self.program.params[name].tensor, values)
        for name, outliers in self._outliers.items():
            outliers.window.clear()
            outliers.window.extend(saved["outliers"].get(name, ()))
        self._skips, self.last_step = saved["skips"], saved["step"]
        # the next step begins where the last one ended, also if steps have another size from now on
        if not self._overfit:
            self.data.ahead = saved["tokens"] // self.data.seq_len - self.last_step * self.data.sequences
        return self.last_step

    def _folder(self) -> Path:
        if self.out is None:
            raise HandgradError(
                "train", "a trainer that saves has a run folder", "out=None", hint="Trainer(..., out='runs/name')"
            )
        return self.out
