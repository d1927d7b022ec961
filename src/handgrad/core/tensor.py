"""Tensor: a named shape. It holds no data and has no operators, so models cannot compute element by element."""

import math
from dataclasses import dataclass
from enum import Enum

from handgrad.core.dtypes import DType

IGNORE_INDEX = -1  # a target that the loss ignores


class Role(Enum):
    """Determines the region of the arena."""

    INPUT = "input"  # written by the host: before a run, or once (a constant)
    PARAM = "param"
    GRAD = "grad"  # of a parameter
    STATE = "state"  # kept from step to step: optimizer moments, low halves of weights, the KV cache
    ACT = "act"  # live from its first to its last use in the list
    SCALARS = "step scalar"


@dataclass(frozen=True, eq=False)
class Tensor:
    """A handle. `flat` names the flat vector that it is a slice of (parameters, gradients and optimizer state)."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    role: Role
    flat: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    def __repr__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"
