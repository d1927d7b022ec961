"""ema in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def ema(average: np.ndarray, weight: np.ndarray, decay: float, step: int) -> np.ndarray:
    """average (n) after step `step`, counted from 1; weight (n): the full-precision weights after its update."""
    keep = min(decay, (1 + step) / (10 + step))
    return average + (1 - keep) * (weight - average)
