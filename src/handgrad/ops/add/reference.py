"""add in numpy. Works in the dtype of its inputs."""

import numpy as np


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """y = a + b, all (N, C)."""
    return a + b
