"""Trainer: one arena, the programs of a run bound to it, and what a loop calls: step, evaluate, generate, save."""

import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.backends import best_dtype, open_backend
from handgrad.backends.base import Backend, Executable
from handgrad.backends.ranks.startup import open_comm
from handgrad.core.errors import HandgradError
from handgrad.core.install import own_version
from handgrad.core.number import real
from handgrad.core.number import whole as whole_number
from handgrad.core.op import ONLY, Call, MicroBatch
from handgrad.core.plan import Plan
from handgrad.core.precision import Precision
from handgrad.core.program import Segment
from handgrad.data import Data
from handgrad.data.objectives import num_targets
from handgrad.evals import Scorer
from handgrad.infer import Engine, Sampling
from handgrad.io import checkpoint
from handgrad.models import Model, to_dict
from handgrad.optim import Optimizer
from handgrad.train import checks
from handgrad.train.average import Average
from handgrad.train.execution import Execution, for_data
from handgrad.train.journal import Journal, recorded_settings
from handgrad.train.optimizers import optimizer_name
from handgrad.train.outliers import Outliers, skip_reason
from handgrad.train.record import record
from handgrad.train.restore import check_model, restore, state_since
from handgrad.train.shards import GRAD, PARAM, state, whole
from handgrad.train.start import Start, drawing, initialize, write_weight
from handgrad.train.step import Step
from handgrad.train.tuning import declared


class Trainer:
    """Trains a model. Everything is planned, allocated and bound here; a step allocates no tensor.

    model, optim, data   what to train, how, on what; data.batch_tokens is one optimizer step
    execution            micro-batch, memory and backend: how a step is executed
    precision            the element types; None: the best of the backend, as `dtype auto` of the command line
    backend              an opened backend to run on; None opens the one that `execution` names. Where a launcher has
                         started several ranks, all of them make the same trainer and the same calls
    start                the initial weights, and the seed of dropout
    out                  the run folder, for save and resume. Steps, validations and settings are written into it, so
                         that generate, eval, report and convert take it (keeps_journal False: checkpoints alone)

    Raises HandgradError where sizes do not fit together, the backend lacks the precision, or memory does not suffice.

    >>> import handgrad as hg
    >>> data = hg.data.tokens(shards, seq_len=16, batch_tokens=64)
    >>> model = hg.models.GPT2(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    >>> run = hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(micro_batch=4))
    >>> first = run.step(1, lr=1e-3)
    >>> round(first.loss, 1)
    4.6
    """

    def __init__(
        self,
        model: Model,
        optim: Optimizer,
        data: Data,
        *,
        execution: Execution,
        precision: Precision | None = None,
        backend: Backend | None = None,
        start: Start = Start(),
        out: str | Path | None = None,
    ):
        checks.check_kinds(optim, data, execution)
        self.model, self.optim, self.data, self.out = model, optim, data, None if out is None else Path(out)
        precision = precision or Precision(best_dtype(execution.backend if backend is None else backend.name))
        self.execution, self.precision = for_data(execution, data), precision
        self.comm = open_comm() if backend is None else backend.comm
        self.accumulation = checks.micro_batches(data, execution.micro_batch, self.comm.world)
        checks.limit_ids(model, data)
        drawn = None
        if start.init == "random":  # drawn while the backend is opened and bound
            drawn = drawing(declared(model, execution, precision.working), start.seed, precision.splits_weights)
        self.backend = backend or open_backend(execution.backend, execution.threads, precision, self.comm)
        checks.check_precision(precision, self.backend)
        accumulates = self.accumulation > 1
        programs = record(model, optim, data.seq_len, precision, self.execution, self.backend, accumulates=accumulates)
        self.program = train = programs.train
        self.ranks = train.ranks
        self.plan: Plan = self.backend.plan(*programs)
        self.arena = self.backend.alloc(self.plan)
        self._train = self.backend.bind(train, self.arena)
        self._loss = None if programs.loss is None else self.backend.bind(programs.loss, self.arena)
        self._engine = Engine(model, programs.engine, self.arena, self.backend) if programs.engine else None
        self.scorer = Scorer(model, programs.scorer, self.arena, self.backend) if programs.scorer else None
        self._average = Average(programs.average, self.backend, self.arena)
        self._outliers = {"loss": Outliers(execution.guard.loss_z), "grad_norm": Outliers(execution.guard.grad_z)}
        self._pending: Step | None = None  # the last step, whose values may still be on their way
        self._writer = checkpoint.Writer()
        self.keeps_journal = out is not None and self.comm.rank == 0
        self.is_torn = False  # an error has ended an update halfway: parameters of two steps
        self._journal: Journal | None = None
        self._resumed_at: int | None = None  # None: `resume` was not called
        self.skips = 0  # updates in a row that were skipped, up to the last step
        self.last_step = 0
        self._exposed_ns = 0  # up to the last step that was awaited
        self.last_loss = math.nan  # of the last step that was awaited
        self.state_since = 0  # steps that bias corrections do not count: before the state began anew, and skipped ones
        self.saved: dict[str, Any] = {}  # the run.json of the checkpoint that it was resumed from
        self.passed_over = ""  # what `resume` says of checkpoints that it did not take
        self.arena.write_scalars(train, seed=start.seed)
        initialize(train, self.arena, start, drawn)

    def __repr__(self) -> str:
        return f"Trainer({self.model}, {self.precision.dtype}, step {self.last_step}, {self.backend.hardware})"

    # training -------------------------------------------------------------------------------------------------------

    def step(self, step: int, lr: float, momentum: float | None = None) -> Step:
        """One optimizer step (counted from 1) at this learning rate and, for an optimizer that schedules it, momentum
        (None: its own). The data of a step depend on its number alone.

        Raises HandgradError, before anything runs, for a number out of range, and a momentum that is not read.
        """
        step, lr = whole_number("train", "step", step, self.state_since + 1), real("train", "lr", lr, 0.0)
        momentum = checks.momentum_of(self.optim, momentum)
        journal = self._open_journal()
        begin, sequences, names = self.backend.mark(), self.execution.micro_batch, self.program.inputs
        waited = self._average.hide()
        batches = [
            self.data.batch(
                step - 1, self.ranks.rank, self.ranks.world, micro_batch=sequences, micro_step=k, names=names
            )
            for k in range(self.accumulation)
        ]
        counts = max(int(self.comm.total(sum(num_targets(b) for b in batches))), 1)  # of all ranks
        self.arena.write_scalars(self.program, step=step, lr=lr, loss_scale=1.0 / counts, momentum=momentum)
        segments = self.program.segments
        for k, b in enumerate(batches):
            self.arena.write_scalars(self.program, micro_step=k * self.ranks.world + self.ranks.rank)
            micro_batch = MicroBatch(first=k == 0, last=k + 1 == len(batches))
            self._start(self._train, b, segments.forward_backward, micro_batch)
        if self._pending is not None:
            self._pending.wait()  # at most one step in flight, so skip decisions stay in step order
            if journal is not None:
                journal.write()
        if self.backend.is_asynchronous:
            self._writer.check()
        else:  # a checkpoint reads the weights in place
            before = self.backend.mark()
            self._writer.wait_until_read()
            waited += self.backend.seconds(before, self.backend.mark())
        guarded, self.is_torn = self.execution.guard.is_on, True
        # a guard: the host decides on the update; else the norm's kernel does, which knows what is not finite
        self._run(self._train, segments.norm if guarded else segments.norm_update)
        scalars = self.arena.fetch_scalars(self.program)

        def finish() -> tuple[float, float, str, int]:
            loss, norm = float(scalars().loss_sum) / counts, float(scalars().grad_norm)
            result.exposed = 1e-9 * (int(scalars().exposed_ns) - self._exposed_ns)
            self._exposed_ns = int(scalars().exposed_ns)
            skipped = skip_reason(self._outliers, loss, norm, self.execution.guard.is_on)
            self.last_loss = loss
            self._count(skipped)
            return loss, norm, skipped, self.skips

        self._pending = result = Step(finish)
        result.waited = waited
        self.last_step = step
        if guarded and not result.skipped:
            self._run(self._train, segments.update)
        result.end, self.is_torn = self.backend.mark(), False
        if journal is not None:
            journal.add(step, lr, result, lambda: self.backend.seconds(begin, result.end) - result.waited)
            if not self.backend.is_asynchronous:
                journal.write()
        return result

    def is_whole(self) -> bool:
        """Whether weights and state are those of the last step. Waits for it; another rank may have failed in it."""
        try:
            if self._pending is not None:
                self._pending.wait()
        except HandgradError:
            return False
        return not self.is_torn

    def _open_journal(self) -> Journal | None:
        """The log and the settings in the run folder, if this trainer keeps them."""
        if self.keeps_journal and self._journal is None:
            settings = recorded_settings(self.model, self.optim, self.data, self.execution, self.precision.dtype)
            self._journal = Journal(self._folder(), self._resumed_at, settings, self.plan.memory_map(), self.data)
            weakref.finalize(self, self._journal.close)
        if self._journal is not None:
            self._journal.check_open()
        return self._journal

    def close(self) -> None:
        """Waits for the last step and checkpoint, writes what the log still lacks, and frees the run folder."""
        self.wait_saved()
        if self._journal is not None:
            self._journal.close()
            self._journal, self._resumed_at = None, self.last_step

    def _count(self, skipped: str) -> None:
        """Counts an update, or that it was skipped; bias corrections do not count those."""
        self.skips = self.skips + 1 if skipped else 0
        if skipped:
            self.state_since += 1
            self.arena.write_scalars(self.program, state_since=self.state_since)

    def trace(self, after: Callable[[Call, float], None]) -> None:
        """Runs a step on the inputs that lie in the arena, call by call; `after` sees each call and its seconds.

        The weights are updated as in any step.
        """
        self._writer.wait_until_read()
        self._average.hide()
        self.arena.write_scalars(self.program, micro_step=0)
        self._train.run_each(after)

    def use_average(self) -> None:
        """Puts the average that an optimizer such as ScheduleFree keeps in the place of the weights, until the next
        step. `evaluate` and `generate` call it; call it before you use `scorer`. All ranks call it, unless they hold
        whole optimizer states (zero 0)."""
        if self._average.is_kept and not self.backend.is_asynchronous:  # a checkpoint reads the weights in place
            self._writer.wait_until_read()
        self._average.show()

    def evaluate(self, data: Data, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token over the first `max_tokens` of `data` (all if None), whatever the batch size and
        the number of ranks."""
        return self.validate(data, max_tokens)["val_loss"]

    def validate(self, data: Data, max_tokens: int | None = None) -> dict[str, float]:
        """As `evaluate`, by the names of the log: val_loss, and val_acc, a classifier's share of right labels."""
        run = checks.check_validation(self._loss, data, self.data.seq_len)
        checks.limit_ids(self.model, data)
        self.use_average()
        total, counts, hits = 0.0, 0, 0
        names, mine = run.program.inputs, (self.ranks.rank, self.ranks.world)
        for b in data.sweep(self.execution.micro_batch, max_tokens, *mine, names=names):
            self._start(run, b)
            total += float(self.arena.fetch_scalars(run.program)().loss_sum)  # of all ranks
            counts += num_targets(b)
            if "logits" in run.program.outputs:
                hits += int((self.arena.fetch(run.program.outputs["logits"])().argmax(axis=1) == b["targets"]).sum())
        of = max(self.comm.total(counts), 1)
        found = {"val_loss": total / of}
        if "logits" in run.program.outputs:
            found["val_acc"] = self.comm.total(hits) / of
        if self._journal is not None:  # reading a run leaves it as it is
            self._journal.validation(self.last_step, **found)
        return found

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling = Sampling(),
        stop_ids: Collection[int] = (),
        drawable: np.ndarray | None = None,
    ) -> Iterator[int]:
        """Yields token ids after `prompt` with the current weights, as `Engine.generate`; they are below the model's
        vocabulary, or among `drawable`. It uses the arena: finish before the next step. With zero 3 all ranks take
        part; otherwise one rank can do it alone, after a `use_average` of all."""
        if not self.model.continues_text:
            raise HandgradError("train", f"a {self.model.family} continues no texts")
        if self._engine is None:
            raise HandgradError("train", "this trainer is not planned for samples", hint="extra_programs=('sample',)")
        self.use_average()
        return self._engine.generate(prompt, max_tokens, sampling, stop_ids, drawable)

    def _start(
        self,
        run: Executable,
        batch: dict[str, np.ndarray],
        segment: Segment | None = None,
        micro_batch: MicroBatch = ONLY,
    ) -> None:
        """Starts one micro-batch."""
        for name, tensor in run.program.inputs.items():
            checks.check_fills(batch[name].size, tensor)
            self.arena.write(tensor, batch[name].reshape(-1))
        self._run(run, segment, micro_batch)

    def _run(self, run: Executable, segment: Segment | None, micro_batch: MicroBatch = ONLY) -> None:
        if self.execution.check == "nan":
            run.run_each(partial(checks.check_finite, self.arena), segment, micro_batch)
        else:
            run.run(segment, micro_batch)

    # checkpoints ------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, np.ndarray]:
        """What a resume needs besides weights (`shards.state`)."""
        return state(self.arena, self.comm, self.program)

    def tokens(self, step: int) -> int:
        """Tokens that have been read when a step is done."""
        return (self.data.ahead + step * self.data.sequences) * self.data.seq_len

    def params(self) -> dict[str, np.ndarray]:
        """The weights by name, in the working dtype; on the host, views of them. With zero 3 all ranks call this, and
        rank 0 alone gets them, as copies. They are those that learn, not their average."""
        self._average.hide()
        return dict(whole(self.arena, self.comm, self.program, PARAM))

    def grads(self) -> dict[str, np.ndarray]:
        """The gradients by name, before clipping; on the host, views. They hold until anything else runs. With zero 1
        to 3 all ranks call this, and rank 0 alone gets them, as copies."""
        return dict(whole(self.arena, self.comm, self.program, GRAD))

    def load_params(self, params: dict[str, np.ndarray]) -> None:
        """Replaces the weights, in float32 precision, by arrays of the same names and shapes."""
        self._writer.wait_until_read()
        self._average.hide()
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
        keep: Collection[int] = (),
        best: int | None = None,
        notes: Mapping[str, Any] = {},
        wait: bool = True,
        before_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes a complete checkpoint of this step into the run folder. All ranks call this, and rank 0 writes.

        keep_last: newest checkpoints that are kept, 0 for all. While updates are skipped all are, since the weights
            may have diverged: the last good ones stay
        keep_every: multiples of this step are never deleted;  keep: nor are these steps
        best: the step that the link `best` leads to once this checkpoint is complete; it is not deleted, either
        notes: what else the checkpoint's run.json gives `saved` of a trainer that resumes from it
        before_done: called before the checkpoint counts, when it is on disk; by another thread
        wait: False returns at once, and what goes wrong is raised by a later step, save or `wait_saved`. On the host
            the weights are read where they lie, and the next update waits for that; of a device's, and of what ranks
            hold shares of, a copy is made first

        Raises HandgradError if it cannot be written, or the weights or the optimizer state are not finite: older
        checkpoints are then as they were.
        """
        self.wait_saved()  # before there is a copy of another
        if self._pending is not None:
            self._pending.wait()  # its outlier scores belong to the checkpoint
        journal = self._open_journal()

        def on_disk() -> None:
            before_done()
            if journal is not None:
                journal.flush()

        if journal is not None:
            journal.write()
        params, held = self.params(), self._state()
        if self.comm.rank > 0:
            return
        meta = self._meta(step, next(iter(params.values())).dtype.name) | {"config": config or {}, **notes}
        kept: dict[str, Any] = {
            "keep_last": sys.maxsize if self.skips else keep_last or sys.maxsize,
            "keep_every": keep_every,
        }
        kept |= {"keep": keep, "best": best, "before_done": on_disk}
        kept["frozen"] = {name for name, info in self.program.params.items() if not info.trainable}
        self._writer.save(self._folder(), step, params, held, meta, **kept)
        if wait:
            self.wait_saved()

    def _meta(self, step: int, stored: str) -> dict[str, Any]:
        """What a checkpoint's run.json says of this trainer. stored: float64 where the ref backend trained."""
        return {
            "step": step,
            **to_dict(self.model),
            **self.execution.tuning,
            "dtype": self.program.dtype.name,
            "stored": stored,
            "tokens": self.tokens(step),
            "outliers": {name: list(o.window) for name, o in self._outliers.items()},
            "skips": self.skips,
            "optimizer": optimizer_name(self.optim),
            "state_since": self.state_since,
            "interpolation": getattr(self.optim, "interpolation", None),
            "versions": {"handgrad": own_version()} | {name: version(name) for name in ("numpy", "safetensors")},
        }

    def wait_saved(self) -> None:
        """Waits until the last checkpoint is complete; raises what went wrong."""
        self._writer.wait()

    def resume(self, pass_over: bool = False, until: int | None = None, fresh: bool = False) -> int:
        """Continues from the newest complete checkpoint of the run folder; returns its step, 0 if there is none.

        pass_over: of checkpoints that hold values that are not finite, take the one before, and say so in
            `passed_over`. Otherwise, or if none is left, HandgradError names the first
        until: take the newest up to this step. HandgradError if there is none
        fresh: take the weights alone; the optimizer's state starts anew, so it may be another optimizer
        """
        self.close()
        self._resumed_at = None  # until it has succeeded
        names = [str(path) for path in checkpoint.complete(self._folder(), until)]
        paths, refusal = self.comm.all_gather_object(names)[0], None
        found = [Path(path) for path in paths]
        for path in found:
            try:
                step = self._resume_from(path, fresh)
            except checkpoint.NotFiniteError as error:
                refusal = refusal or error
                if not pass_over:
                    break
            else:
                self.passed_over = f"passed over {found[0].name}: {refusal}" if refusal else ""
                self._resumed_at = step
                return step
        if refusal:
            raise refusal
        if until is not None:
            rule = f"the run goes on from a checkpoint of step {until} or before"
            raise HandgradError("resume", rule, f"none in '{self.out}'", hint="--resume without --extend")
        if self.last_step:
            rule = f"no checkpoint in '{self.out}' to resume from, and this trainer is at step {self.last_step}"
            raise HandgradError("train", rule, hint="a new Trainer starts over")
        self._resumed_at = 0
        return 0

    def _resume_from(self, path: Path, fresh: bool) -> int:
        """Takes weights, state and position from a complete checkpoint; returns its step."""
        kinds = {"model": dict, "dtype": str, "tokens": int, "outliers": dict, "skips": int}
        saved = checkpoint.load_meta(path, kinds)
        check_model(saved, path, self.model, self.execution.tuning, self.program.dtype.name)
        self._average.hide()
        restore(self.arena, self.program, path, saved, self.optim, fresh)
        self.saved, self.state_since = saved, state_since(saved, path, fresh)
        self.arena.write_scalars(self.program, state_since=self.state_since)
        for name, outliers in self._outliers.items():
            outliers.window.clear()
            outliers.window.extend(saved["outliers"].get(name, ()))
        self.skips, self.last_step, self._pending = saved["skips"], saved["step"], None
        # the next step begins where the last one ended, also if steps have another size from now on
        if not self.data.overfit:
            self.data.ahead = saved["tokens"] // self.data.seq_len - self.last_step * self.data.sequences
        return self.last_step

    def _folder(self) -> Path:
        if self.out is None:
            raise HandgradError("train", "this trainer has no run folder", hint="Trainer(..., out='runs/name')")
        return self.out
