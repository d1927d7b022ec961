"""What a backend is: it allocates the arena of a plan and turns a list of calls into running code.

Nothing else in handgrad asks which backend is running. A new one implements these two classes and a line in `BACKENDS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from handgrad.core.op import Op
from handgrad.core.plan import Plan
from handgrad.core.program import Call, Program
from handgrad.core.tensor import Tensor


class Executable(ABC):
    """A program bound to an arena."""

    program: Program

    @abstractmethod
    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Runs the calls [start, stop) of the list."""

    @abstractmethod
    def run_each(self, after: Callable[[Call, float], None], start: int = 0, stop: int | None = None) -> None:
        """Runs call by call; `after(call, seconds)` sees each one when its outputs are ready. For traces and checks."""


class Arena(ABC):
    """One allocation of `plan.nbytes` bytes, zeroed."""

    plan: Plan

    @abstractmethod
    def view(self, tensor: Tensor) -> Any:
        """The tensor's memory as a numpy array (a view; bf16 as ml_dtypes.bfloat16)."""

    @abstractmethod
    def part(self, flat: str, param: Tensor) -> Any:
        """A parameter's stretch of a flat vector ("param", "grad", "m", ...) as a view of its shape."""

    @abstractmethod
    def knobs(self, program: Program) -> Any:
        """The program's Knobs as a numpy record (a view)."""


class Backend(ABC):
    """`name`, `scratch` for the planner, `alloc` and `bind`."""

    name: str

    @abstractmethod
    def has(self, op: Op) -> bool:
        """Whether this backend implements the op."""

    @abstractmethod
    def scratch(self, call: Call) -> int:
        """Bytes of scratch that this backend's kernel needs for a call."""

    @abstractmethod
    def alloc(self, plan: Plan) -> Arena:
        """Takes the memory. The only allocation of a run."""

    @abstractmethod
    def bind(self, program: Program, arena: Arena) -> Executable:
        """Callables for every call; raises before anything runs if an op has no kernel here."""
