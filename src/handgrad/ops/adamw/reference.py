"""adamw in numpy: the math as it is written in README.md. Works in the dtype of its inputs."""

import numpy as np


def adamw(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    grad: np.ndarray,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr: float,
    step: int,
    grad_scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, m, v (n) after one step, counted from 1. p is the whole weight, also where the dtype is bf16."""
    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    p = p - lr * weight_decay * p
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v
