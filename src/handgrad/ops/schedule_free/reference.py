"""schedule_free in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def count_step(count: np.ndarray, lr: float) -> np.ndarray:
    """count (2) after a step at this learning rate: 1 / the share of the step in the average, and the largest rate."""
    steps, peak = count
    highest = max(peak, lr)
    return np.stack([steps * (peak / highest) ** 2 + 1, highest]) if highest > 0 else count


def schedule_free(
    y: np.ndarray,
    z: np.ndarray,
    v: np.ndarray,
    grad: np.ndarray,
    count: np.ndarray,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr: float,
    step: int,
    grad_scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, z, v (n) after one step; steps count from 1. count (2) has counted it."""
    g = grad * grad_scale
    v = beta2 * v + (1 - beta2) * g**2
    d = g / (np.sqrt(v / (1 - beta2**step)) + eps) + weight_decay * y
    share = 1 / count[0] if count[0] > 0 else 0.0
    return y + share * (z - y) - lr * (1 - beta1 * (1 - share)) * d, z - lr * d, v


def average(y: np.ndarray, z: np.ndarray, beta1: float) -> np.ndarray:
    """x (n), of which y = beta1 x + (1 - beta1) z. It is y, to the bit, where z is."""
    return y + y.dtype.type(1 - 1 / beta1) * (z - y)
