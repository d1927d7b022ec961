"""lora in numpy: the formulas of README.md. `v` holds the inputs, sizes and attributes of the op."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def spans(v: Any) -> Iterator[tuple[slice, slice, slice]]:
    """(columns of y, columns of u, rows of w) of every span."""
    row = 0
    for p, (at, n) in enumerate(((v.at0, v.n0), (v.at1, v.n1), (v.at2, v.n2))):
        if n:
            yield slice(at, at + n), slice(p * v.R, (p + 1) * v.R), slice(row, row + n)
        row += n


def lora_forward(v: Any) -> np.ndarray:
    """y (N, M) = base, and in every span + scale u w^T."""
    y = v.base.copy()
    for columns, us, rows in spans(v):
        y[:, columns] += v.scale * (v.u[:, us] @ v.w[rows].T)
    return y


def lora_backward(v: Any) -> tuple[np.ndarray, np.ndarray]:
    """du (N, U) and dw (W, R) from dy (N, M)."""
    du, dw = np.zeros_like(v.u), np.zeros_like(v.w)
    for columns, us, rows in spans(v):
        du[:, us] = v.scale * (v.dy[:, columns] @ v.w[rows])
        dw[rows] = v.scale * (v.dy[:, columns].T @ v.u[:, us])
    return du, dw
