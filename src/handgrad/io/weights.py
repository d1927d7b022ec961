"""Weights: a model in a file, whoever wrote it: its fields, and tensors by our names, each read when asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

NUMPY = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Weights:
    """A model in a file.

    fields: those of the model's dataclass
    dtype: "f32" or "bf16", of the tensors
    shapes: name -> shape of every tensor, without rows of padding
    read: name -> tensor; it may have rows of padding
    """

    fields: Mapping[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]

    def tensor(self, name: str, dtype: str | None = None, rows: int | None = None) -> np.ndarray:
        """Returns a tensor in `dtype` (as it is read if None), rounded to nearest, ties to even.

        rows: this many, zeros past those of its shape; None: those of its shape
        """
        values = self.read(name)[: self.shapes[name][0]]
        values = values if dtype is None else values.astype(NUMPY[dtype], copy=False)
        return with_rows(values, rows or len(values))


def with_rows(values: np.ndarray, rows: int) -> np.ndarray:
    """An array padded with rows of zeros."""
    if len(values) == rows:
        return values
    return np.pad(values, ((0, rows - len(values)), *((0, 0),) * (values.ndim - 1)))
