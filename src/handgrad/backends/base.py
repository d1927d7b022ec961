"""What a backend is: it allocates the arena of a plan and turns a list of calls into running code.

Nothing else in handgrad asks which backend is running. A new one implements these classes and a line in `BACKENDS`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from handgrad.core.op import ONLY, Call, MicroBatch, Op
from handgrad.core.plan import Plan, plan
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Tensor


class Executable(ABC):
    """A program bound to an arena."""

    program: Program

    @abstractmethod
    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        """Starts a segment of the list (all of it if None) for a micro-batch of the step, after everything that was
        started before. A device may still be executing it when this returns."""

    @abstractmethod
    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        """Runs call by call; `after(call, seconds)` sees each one when its outputs are ready. For traces and checks."""


class Arena(ABC):
    """One allocation of `plan.nbytes` bytes, zeroed. Reads and writes take their turn among the runs."""

    plan: Plan

    @abstractmethod
    def fetch(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """Starts reading a tensor; calling the result waits and returns its values (bf16 as ml_dtypes.bfloat16)."""

    @abstractmethod
    def write(self, tensor: Tensor, values: Any) -> None:
        """Fills a tensor; `values` may change as soon as this returns."""

    @abstractmethod
    def read_part(self, flat: str, param: Tensor) -> np.ndarray:
        """A parameter's slice of a flat vector ("param", "grad", "m", ...) in its shape; on the host, a view."""

    @abstractmethod
    def write_part(self, flat: str, param: Tensor, values: Any) -> None:
        """Fills a parameter's slice of a flat vector."""

    @abstractmethod
    def fetch_scalars(self, program: Program) -> Callable[[], Any]:
        """Starts reading a program's StepScalars; calling the result waits and returns them as a numpy record."""

    @abstractmethod
    def write_scalars(self, program: Program, **values: int | float) -> None:
        """Sets some of a program's StepScalars."""

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor, when all that was started is done."""
        return self.fetch(tensor)()


class Planner(ABC):
    """What planning and explaining a run needs of a backend; no hardware."""

    name: str
    head_rows: int  # rows of logits that exist at a time, unless Execution.head_bytes is set
    head_bytes: int  # of those logits at most: a large vocabulary gets fewer rows
    is_concurrent: bool = False  # calls whose op allows it overlap the calls after them

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
        """Which implementation a call is bound to, where there is a choice."""
        return ""


class Backend(Planner):
    """A planner with its hardware: `alloc` and `bind`."""

    hardware: str  # what it runs on, for people
    dtypes: tuple[str, ...] = ("f32", "bf16")
    grad_dtypes: tuple[str, ...] = ("f32",)
    is_asynchronous: bool = False  # runs are started, not awaited
    truncated_terms: int = 0  # bf16 products added at a time, the sum being truncated; 0: rounded after each
    pci_bus: str = ""  # address of the card, by which its telemetry is found; empty: no card

    def mark(self) -> Any:
        """This point in the queue of what was started. Taking it waits for nothing."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """The time from one mark to another; waits until the device has reached the later one."""
        return end - begin

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s that the hardware can do in this dtype, if that is known."""
        return None

    @abstractmethod
    def alloc(self, plan: Plan) -> Arena:
        """Takes the memory. The only allocation of a run."""

    @abstractmethod
    def bind(self, program: Program, arena: Arena) -> Executable:
        """Callables for every call; raises before anything runs if an op has no kernel here."""
