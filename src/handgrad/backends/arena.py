"""Arenas in host memory: what they share, and HostArena, the planned arena of the ref and cpu backends."""

import math
import mmap
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from handgrad.backends.base import Arena
from handgrad.core.errors import HandgradError
from handgrad.core.limits import memory_limits
from handgrad.core.op import Call, MicroBatch
from handgrad.core.plan import MIB, REGIONS, Plan
from handgrad.core.program import Program
from handgrad.core.scalars import STEP_SCALARS
from handgrad.core.tensor import Tensor

NUMPY = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i32": np.int32, "i16": np.int16, "byte": np.uint8}
STEP_SCALARS_DTYPE = np.dtype(
    [(name, {"u64": "<u8", "i64": "<i8", "f64": "<f8", "f32": "<f4"}[kind]) for name, kind, _ in STEP_SCALARS]
)


class HostMemory(Arena):
    """An arena whose tensors are numpy arrays: reads return views or copies and never wait."""

    @abstractmethod
    def view(self, tensor: Tensor) -> np.ndarray:
        """The tensor's memory."""

    @abstractmethod
    def vector(self, name: str) -> np.ndarray:
        """The memory of a flat vector."""

    @abstractmethod
    def scalars(self, program: Program) -> Any:
        """The memory of the program's StepScalars, as a numpy record."""

    def fetch(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        values = np.array(self.view(tensor))
        return lambda: values

    def write(self, tensor: Tensor, values: Any) -> None:
        self.view(tensor)[...] = values

    def operands(self, c: Call, program: Program, micro_batch: MicroBatch) -> SimpleNamespace:
        """What `Op.exchange` gets of a call: the memory of its tensors, its sizes and attributes."""
        views: dict[str, Any] = {}
        for args, tensors in ((c.op.in_args, c.ins), (c.op.out_args, c.outs)):
            views |= {a.name: self.view(t) for a, t in zip(args, tensors) if t is not None and a.name != "scalars"}
        accumulates = lambda out: c.accumulates(out, micro_batch)  # noqa: E731
        values = {"scalars": self.scalars(program), "accumulates": accumulates, **c.sizes, **c.attrs, **views}
        return SimpleNamespace(**values)

    def part(self, flat: str, param: Tensor) -> np.ndarray:
        """The memory of a parameter's slice of a flat vector, or, 1-D, of the elements of it that this rank holds."""
        vector = self.plan.vectors[flat]
        shape = vector.shape(param)
        start, low, high = vector.piece(param)
        piece = self.vector(flat)[start : start + high - low]
        return piece.reshape(shape) if high - low == math.prod(shape) else piece

    def read_part(self, flat: str, param: Tensor) -> np.ndarray:
        return self.part(flat, param)

    def write_part(self, flat: str, param: Tensor, values: Any) -> None:
        vector = self.plan.vectors[flat]
        shape = vector.shape(param)
        _, low, high = vector.piece(param)
        if high - low < math.prod(shape):
            values = np.broadcast_to(values, shape).reshape(-1)[low:high]
        self.part(flat, param)[...] = values

    def fetch_scalars(self, program: Program) -> Callable[[], Any]:
        values = self.scalars(program).copy()
        return lambda: values

    def write_scalars(self, program: Program, **values: int | float) -> None:
        for name, value in values.items():
            setattr(self.scalars(program), name, value)


class HostArena(HostMemory):
    """Zeroed, page-aligned host memory, in huge pages if Linux has them, since GEMMs touch many pages at a time."""

    def __init__(self, plan: Plan):
        self.plan = plan
        size = max(plan.nbytes, 1)
        free, limit = min(memory_limits())
        if size > free:
            raise does_not_fit(plan, free, f" ({limit})" if limit else "")
        try:  # private, because Linux does not back shared anonymous memory with huge pages
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise does_not_fit(plan, free, f", but Linux does not give them: {error.strerror}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # Linux without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._memory, np.uint8)
        self.address = self.bytes.ctypes.data
        self.write_constants()

    def fill(self, byte: int) -> None:
        """Sets every byte, for checks of what kernels write."""
        self.bytes[:] = byte

    def memory(self) -> np.ndarray:
        """A copy of all bytes."""
        return self.bytes.copy()

    def view(self, tensor: Tensor) -> np.ndarray:
        start = self.plan.offset[tensor]
        return self.bytes[start : start + tensor.nbytes].view(NUMPY[tensor.dtype.name]).reshape(tensor.shape)

    def vector(self, name: str) -> np.ndarray:
        v, start = self.plan.vectors[name], self.plan.start[name]
        return self.bytes[start : start + v.nbytes].view(NUMPY[v.dtype.name])

    def scalars(self, program: Program) -> Any:
        return self.view(program.scalars).view(STEP_SCALARS_DTYPE)[0:1].view(np.recarray)[0]


def does_not_fit(plan: Plan, free: int, others: str = "") -> HandgradError:
    """The error for an arena larger than the free memory (bytes); `others`: remarks on the free memory."""
    parts = " | ".join(f"{name} {plan.region[name][1] / MIB:.0f}" for name in REGIONS)
    return HandgradError(
        "memory",
        f"the arena fits in memory, {free / MIB:.0f} MiB are free{others}",
        f"{plan.nbytes / MIB:.0f} MiB ({parts})",
        hint="a smaller micro_batch, recompute 'act' or 'block', a smaller head_bytes (--head-mib); "
        "handgrad explain shows what each saves",
    )
