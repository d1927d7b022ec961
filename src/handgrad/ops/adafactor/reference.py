"""adafactor in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def adafactor(
    p: np.ndarray,
    row: np.ndarray,
    col: np.ndarray,
    grad: np.ndarray,
    first: int,
    factor: float,
    count: int,
    decay: float,
    eps: float,
    clip: float,
    weight_decay: float,
    lr: float,
    step_lr: float,
    step: int,
    grad_scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, row (M), col (K) after one step: p are elements of the matrix, from `first` on. count: elements of the matrix
    that are not padding; step_lr: of the step, lr: of the decay."""
    g = (grad * grad_scale).reshape(row.size, col.size)
    beta = 1.0 - step**-decay
    row = beta * row + (1 - beta) * (np.mean(g**2, axis=1) + eps)
    col = beta * col + (1 - beta) * (np.mean(g**2, axis=0) + eps)
    u = g / np.sqrt(row / row.mean())[:, None] / np.sqrt(col)[None, :]
    u = u / max(1.0, float(np.sqrt(np.sum(u.astype(np.float64) ** 2) / count)) / clip)
    mine = u.reshape(-1)[first : first + p.size]
    return p - lr * weight_decay * p - step_lr * factor * mine, row, col
