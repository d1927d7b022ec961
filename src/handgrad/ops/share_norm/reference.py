"""share_norm in numpy."""

import numpy as np


def share_norm(x: np.ndarray) -> np.ndarray:
    """The L2 norm of x (n), as an array of one element."""
    return np.sqrt((x.astype(np.float64) ** 2).sum(keepdims=True))
