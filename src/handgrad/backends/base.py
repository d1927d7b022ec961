"""The interface of a backend: it allocates the arena of a plan and turns a list of calls into running code.

No other code depends on which backend runs. A new backend implements these classes and adds a line to `BACKENDS`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.core.dtypes import DType
from handgrad.core.op import ONLY, Call, MicroBatch, Op
from handgrad.core.plan import Plan, plan
from handgrad.core.program import Program, Segment
from handgrad.core.ranks import Ranks
from handgrad.core.tensor import Tensor


class Executable(ABC):
    """A program bound to an arena."""

    program: Program

    @abstractmethod
    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        """Starts a segment of the list (None: all of it) for a micro-batch of the step. It executes after everything
        started before. A device may still be executing it when this returns."""

    @abstractmethod
    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        """Runs call by call, with `after(call, seconds)` when a call has finished. For traces and checks."""


class Arena(ABC):
    """One allocation of `plan.nbytes` bytes: constants, the rest zero. Reads and writes execute in order with runs."""

    plan: Plan

    def write_constants(self) -> None:
        """Fills the constants of every program. The end of each arena's `__init__`."""
        for tensor, values in (constant for p in self.plan.programs for constant in p.constants.values()):
            self.write(tensor, values())

    @abstractmethod
    def fetch(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """Starts reading a tensor; calling the result waits and returns its values (bf16 as ml_dtypes.bfloat16)."""

    @abstractmethod
    def write(self, tensor: Tensor, values: Any) -> None:
        """Fills a tensor; `values` may change as soon as this returns."""

    @abstractmethod
    def read_part(self, flat: str, param: Tensor) -> np.ndarray:
        """A parameter's slice of a flat vector ("param", "grad", "m", ...), in its shape; of a sharded vector the
        elements of it that this rank holds. On the host it is a view."""

    @abstractmethod
    def write_part(self, flat: str, param: Tensor, values: Any) -> None:
        """Fills a parameter's slice of a flat vector, or what this rank holds of it, with the values of all of it."""

    @abstractmethod
    def fetch_scalars(self, program: Program) -> Callable[[], Any]:
        """Starts reading a program's StepScalars; calling the result waits and returns them as a numpy record."""

    @abstractmethod
    def write_scalars(self, program: Program, **values: int | float) -> None:
        """Sets some of a program's StepScalars."""

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor after everything started so far has finished."""
        return self.fetch(tensor)()


class Planner(ABC):
    """The part of a backend that plans and explains a run, without its hardware."""

    name: str
    head_rows: int  # most rows of a chunk of logits, unless Execution.head_bytes is set
    comm: Comm = Alone()  # the ranks that its programs exchange values with
    is_concurrent: bool = False  # calls whose op allows it overlap the calls after them

    def head_bytes(self, dtype: DType) -> int:
        """Most bytes of a chunk of logits of this dtype: head_rows rows of GPT-2's padded vocabulary. A larger
        vocabulary gets fewer rows."""
        return self.head_rows * 50304 * dtype.size

    def ranks(self, zero: int) -> Ranks:
        """The ranks for which it plans, this one among them, with a ZeRO stage."""
        return Ranks(self.comm.rank, self.comm.world, zero, overlaps=self.is_concurrent)

    @abstractmethod
    def has(self, op: Op) -> bool:
        """Whether this backend implements the op."""

    @abstractmethod
    def scratch(self, call: Call) -> int:
        """Bytes of scratch that this backend's kernel needs for a call."""

    def plan(self, *programs: Program) -> Plan:
        """The layout of an arena in which these programs run here."""
        return plan(*programs, scratch=self.scratch, concurrent=self.is_concurrent)

    def note(self, call: Call) -> str:
        """The implementation of a call, if the backend has several."""
        return ""


class Backend(Planner):
    """A planner with its hardware: `alloc` and `bind`."""

    hardware: str  # a description for the log
    dtypes: tuple[str, ...] = ("f32", "bf16")
    grad_dtypes: tuple[str, ...] = ("f32",)
    tf32: bool = False  # float32 matmuls round their operands
    deterministic: bool = True  # same bits whatever is recomputed
    is_asynchronous: bool = False  # `run` returns before the device has finished
    truncated_terms: int = 0  # bf16 products that are summed and truncated together; 0: every addition rounds
    pci_bus: str = ""  # PCI address of the GPU, which identifies it for telemetry; empty: no GPU

    def mark(self) -> Any:
        """Marks this point in the queue of started work, without waiting."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another. Waits until the device has reached the later one."""
        return end - begin

    def peak_flops(self, dtype: str) -> float | None:
        """Peak FLOP/s of the hardware in this dtype; None if unknown."""
        return None

    def peak_bandwidth(self) -> float | None:
        """Bytes/s of the hardware's memory; None if unknown."""
        return None

    @abstractmethod
    def alloc(self, plan: Plan) -> Arena:
        """Allocates the arena: the only allocation of a run."""

    @abstractmethod
    def bind(self, program: Program, arena: Arena) -> Executable:
        """Binds a program to an arena that this backend allocated. Raises HandgradError, before anything runs, if an op
        has no kernel here."""
