"""Tensor: a named shape. It holds no data and has no operators, so nobody can write fine-grained math by accident."""

import math
from dataclasses import dataclass
from enum import Enum

from handgrad.core.dtypes import DType

IGNORE_INDEX = -1  # a target that does not count in a loss


class Role(Enum):
    """Decides the region of the arena that a tensor lives in."""

    INPUT = "input"  # written by the host before a step
    PARAM = "param"
    GRAD = "grad"  # of a parameter
    STATE = "state"  # survives a step: AdamW's moments, low halves of weights, the KV cache
    ACT = "act"  # lives from its first to its last use in the list
    SCALARS = "step scalar"  # the per-step scalars


@dataclass(frozen=True, eq=False)
class Tensor:
    """A handle. `flat` names the flat vector it is a slice of (parameters, their gradients and optimizer state)."""

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
