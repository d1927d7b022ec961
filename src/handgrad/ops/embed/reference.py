"""embed in numpy: the formulas of README.md. `v` holds the inputs, sizes and attributes of the op."""

from typing import Any

import numpy as np


def embed_forward(v: Any, position: int = 0) -> np.ndarray:
    """y (N, C) = scale wte[ids] + wpe[place]; wte (V, C), wpe (Tmax, C) or None, positions (N) or None."""
    y = v.wte[v.ids] * v.scale
    if v.wpe is None:
        return y
    return y + v.wpe[position + np.arange(len(v.ids)) % v.T if v.positions is None else v.positions]


def embed_backward(v: Any) -> tuple[np.ndarray, np.ndarray]:
    """dwte (V, C): the sum of scale dy over the rows of each id;  dwpe (Tmax, C): of dy over those of each place."""
    dwte, dwpe = (np.zeros((rows, v.dy.shape[1]), v.dy.dtype) for rows in (v.V, v.Tmax))
    np.add.at(dwte, v.ids, v.dy)
    if v.positions is not None:
        np.add.at(dwpe, v.positions, v.dy)
    elif v.Tmax:
        dwpe[: v.T] = v.dy.reshape(-1, v.T, v.dy.shape[1]).sum(0)
    return dwte * v.scale, dwpe
