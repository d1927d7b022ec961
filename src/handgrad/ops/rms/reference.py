"""rms in numpy: the formula of README.md. Works in the dtype of its inputs, and sums in float64."""

import numpy as np


def rms(x: np.ndarray, count: int, least: float) -> np.ndarray:
    """(1): the root mean square of `count` elements, at least `least`. x (n) holds them, and zeros."""
    return np.array([max(np.sqrt(np.sum(x.astype(np.float64) ** 2) / count), least)])
