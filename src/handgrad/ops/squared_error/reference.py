"""squared_error in numpy: the square of what a prediction misses, with its gradient. See README.md."""

import numpy as np


def squared_error(z: np.ndarray, targets: np.ndarray, values: np.ndarray, ignore_index: int) -> np.ndarray:
    """losses (N) of predictions z (N, 1); rows with the target ignore_index give 0."""
    return np.where(targets != ignore_index, (z[:, 0] - values) ** 2, 0)


def squared_error_gradient(
    z: np.ndarray, targets: np.ndarray, values: np.ndarray, ignore_index: int, loss_scale: float
) -> np.ndarray:
    """dz (N, 1) of loss_scale * sum of losses."""
    return np.where(targets != ignore_index, 2 * loss_scale * (z[:, 0] - values), 0)[:, None]
