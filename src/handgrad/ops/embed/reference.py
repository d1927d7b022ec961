"""embed in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def embed_forward(ids: np.ndarray, wte: np.ndarray, wpe: np.ndarray | None, T: int, position: int = 0) -> np.ndarray:
    """y (N, C) = wte[ids] + wpe[position + n % T]; wte (V, C), wpe (Tmax, C) or None."""
    y = wte[ids]
    return y if wpe is None else y + wpe[position + np.arange(len(ids)) % T]


def embed_backward(dy: np.ndarray, ids: np.ndarray, V: int, Tmax: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """dwte (V, C): the sum of dy over the rows of each id;  dwpe (Tmax, C): over the rows of each position."""
    dwte = np.zeros((V, dy.shape[1]), dy.dtype)
    np.add.at(dwte, ids, dy)
    dwpe = np.zeros((Tmax, dy.shape[1]), dy.dtype)
    if Tmax:
        dwpe[:T] = dy.reshape(-1, T, dy.shape[1]).sum(0)
    return dwte, dwpe
