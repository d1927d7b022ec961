"""Layer norm and RMS norm in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np


def norm_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y (N, C), mean (N), rstd (N) from x (N, C), w (C), b (C)."""
    mean = x.mean(-1)
    centred = x - mean[:, None]
    rstd = 1 / np.sqrt((centred**2).mean(-1) + x.dtype.type(eps))
    return centred * rstd[:, None] * w + b, mean, rstd


def norm_backward(
    dy: np.ndarray, ds: np.ndarray | None, s: np.ndarray, w: np.ndarray, mean: np.ndarray, rstd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dx (N, C), dw (C), db (C), dhb (C). ds is the gradient that reaches s directly, past the norm."""
    n = (s - mean[:, None]) * rstd[:, None]
    dn = dy * w
    dx = rstd[:, None] * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    dx = dx if ds is None else ds + dx
    return dx, (dy * n).sum(0), dy.sum(0), dx.sum(0)


def rms_norm_forward(x: np.ndarray, w: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """y (N, C), rstd (N) from x (N, C), w (C)."""
    rstd = 1 / np.sqrt((x**2).mean(-1) + x.dtype.type(eps))
    return x * rstd[:, None] * w, rstd


def rms_norm_backward(
    dy: np.ndarray, ds: np.ndarray | None, s: np.ndarray, w: np.ndarray, rstd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx (N, C), dw (C), dhb (C). ds is the gradient that reaches s directly, past the norm."""
    n = s * rstd[:, None]
    dn = dy * w
    dx = rstd[:, None] * (dn - n * (dn * n).mean(-1, keepdims=True))
    dx = dx if ds is None else ds + dx
    return dx, (dy * n).sum(0), dx.sum(0)
