"""lion in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def lion(
    p: np.ndarray,
    m: np.ndarray,
    grad: np.ndarray,
    beta1: float,
    beta2: float,
    weight_decay: float,
    lr: float,
    grad_scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """p, m (n) after one step."""
    g = grad * grad_scale
    direction = np.sign(beta1 * m + (1 - beta1) * g)
    p = p - lr * weight_decay * p
    return p - lr * direction, beta2 * m + (1 - beta2) * g
