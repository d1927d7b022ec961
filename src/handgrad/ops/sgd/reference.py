"""sgd in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def sgd(
    p: np.ndarray,
    m: np.ndarray | None,
    grad: np.ndarray,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    lr: float,
    grad_scale: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """p, m (n) after one step; m is None without momentum."""
    step = grad * grad_scale + weight_decay * p
    if m is not None:
        m = momentum * m + step
        step = step + momentum * m if nesterov else m
    return p - lr * step, m
