"""global_norm in numpy."""

import numpy as np


def global_norm(grad: np.ndarray, clip: float) -> tuple[float, float]:
    """grad_norm, the L2 norm of grad (n), and grad_scale: min(1, clip / (norm + 1e-6)), 1 where clip is 0, 0 where the
    norm is not finite.
    """
    norm = np.sqrt((grad.astype(np.float64) ** 2).sum())
    if not np.isfinite(norm):
        return norm, 0.0
    return norm, np.minimum(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
