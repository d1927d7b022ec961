"""rms and rms_of_ranks in numpy: the formulas of README.md. Work in the dtype of its inputs, and sum in float64."""

import numpy as np


def rms(x: np.ndarray, count: int, least: float) -> np.ndarray:
    """(1): the root mean square of `count` elements, at least `least`. x (n) holds them, and zeros."""
    return np.array([max(np.sqrt(np.sum(x.astype(np.float64) ** 2) / count), least)])


def rms_of_ranks(x: np.ndarray, least: float) -> np.ndarray:
    """(k): the norm of each column of x (W, k), at least `least`."""
    return np.maximum(np.sqrt((x.astype(np.float64) ** 2).sum(0)), least)
