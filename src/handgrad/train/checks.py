"""Checks of what a Trainer is given and of what it computes."""

from typing import Any

import numpy as np

from handgrad.backends.base import Arena, Backend, Executable
from handgrad.core.errors import HandgradError
from handgrad.core.number import real
from handgrad.core.op import Call
from handgrad.core.precision import Precision
from handgrad.core.tensor import Role, Tensor
from handgrad.data import Data
from handgrad.models import Model

MOST_MICRO_BATCHES = 2**14  # whose tokens are in memory together; GPT-3's batch is 1563 of one sequence each


def check_kinds(optim: Any, data: Any, execution: Any) -> None:
    """Raises HandgradError for arguments in another order, or none."""
    kinds = (
        ("optim", optim, "groups", "hg.optim.AdamW()"),
        ("data", data, "batch_tokens", "hg.data.tokens(...)"),
        ("execution", execution, "micro_batch", "hg.Execution(micro_batch=4)"),
    )
    for name, value, needed, example in kinds:
        if not hasattr(value, needed):
            raise HandgradError("train", f"{name} is, for example, {example}", repr(value))


def momentum_of(optim: Any, momentum: float | None) -> float:
    """The momentum of a step, the optimizer's own if it is None. Raises HandgradError for one that is not read."""
    own = getattr(optim, "scheduled_momentum", None)
    if momentum is not None and own is None:
        raise HandgradError("train", f"{type(optim).__name__} reads no momentum", momentum)
    return real("train", "momentum", (own or 0.0) if momentum is None else momentum, 0.0)


def micro_batches(data: Data, micro_batch: int, world: int = 1) -> int:
    """How many micro-batches a step has on each rank. Raises HandgradError unless they fill it."""
    tokens = world * micro_batch * data.seq_len
    if data.batch_tokens % tokens:
        factors = f"micro_batch x seq_len{' x ranks' * (world > 1)}"
        numbers = f"{micro_batch} x {data.seq_len}{f' x {world}' * (world > 1)}"
        rule = f"batch_tokens is a multiple of {factors} = {numbers}"
        sequences, rest = divmod(data.batch_tokens, data.seq_len)
        fitting = [n for n in range(micro_batch, 0, -1) if not rest and sequences % (n * world) == 0]
        hint = f"micro_batch {fitting[0]}" if fitting else f"batch_tokens {-(-data.batch_tokens // tokens) * tokens}"
        raise HandgradError("train", rule, data.batch_tokens, hint=hint)
    count = data.batch_tokens // tokens
    if count > MOST_MICRO_BATCHES:
        rule = f"a step has at most {MOST_MICRO_BATCHES:,} micro-batches, of micro_batch x seq_len tokens each"
        raise HandgradError("train", rule, f"{count:,}", hint="a smaller batch_tokens or a larger micro_batch")
    return count


def limit_ids(model: Model, data: Data) -> None:
    """Has every batch checked against the vocabulary: a kernel would read past the embedding.

    Raises HandgradError if the objective inserts ids that the model lacks.
    """
    if data.objective.largest_id >= model.vocab_size:
        rule = f"the ids that the objective inserts lie below the model's vocabulary of {model.vocab_size}"
        raise HandgradError("train", rule, data.objective.largest_id)
    data.vocab_size = min(model.vocab_size, data.vocab_size or model.vocab_size)


def check_validation(run: Executable | None, data: Any, seq_len: int) -> Executable:
    """Returns the executable of a validation. Raises HandgradError if there is none, or it does not read these data."""
    if run is None:
        raise HandgradError("train", "this trainer is not planned for evaluation", hint="extra_programs=('val',)")
    if not hasattr(data, "sweep"):
        raise HandgradError("train", "data is, for example, hg.data.tokens(folder, ..., split='val')", repr(data))
    if data.seq_len != seq_len:
        raise HandgradError("train", f"validation data has the run's seq_len {seq_len}", data.seq_len)
    return run


def check_fills(count: int, tensor: Tensor) -> None:
    """Raises HandgradError unless so many values fill an input of the model."""
    if count != tensor.size:
        rule = f"the data's objective fills the {tensor.size} of the model's input '{tensor.name}'"
        raise HandgradError("data", rule, count)


def check_finite(arena: Arena, c: Call, seconds: float) -> None:
    """Raises HandgradError if a call has written a value that is not finite."""
    for name, t in c.named_outs():
        if (
            name not in c.op.undefined.split()
            and t.role is not Role.SCALARS
            and t.dtype.unit
            and not np.isfinite(arena.read(t).astype(np.float32)).all()
        ):
            raise HandgradError(
                "check",
                "every output is finite",
                f"a non-finite value in '{name}' of {c.phase} {c.op.name}",
                context=f"block {c.block}, {c.where}",
            )


def check_precision(precision: Precision, backend: Backend) -> None:
    """Raises HandgradError unless the backend computes in these element types."""
    for name, known in (("dtype", backend.dtypes), ("grad_dtype", backend.grad_dtypes)):
        value = getattr(precision, name)
        if value not in known:
            rule = f"{name} is {' or '.join(known)} on the {backend.name} backend"
            raise HandgradError("train", rule, f"'{value}'")
    if precision.tf32 != backend.tf32 or precision.deterministic > backend.deterministic:
        opened = f"one opened with tf32={backend.tf32}, deterministic={backend.deterministic}"
        hint = "open_backend(name, precision=...) with the trainer's precision"
        raise HandgradError("train", f"the backend is opened for {precision}", opened, hint=hint)
