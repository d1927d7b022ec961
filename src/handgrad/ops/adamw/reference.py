"""adamw in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np

from handgrad.ops.dropout.reference import philox4x32

WEIGHT_STREAM = 0xFFFF << 48  # the last of the 2^16 streams; a program numbers its random calls from 1


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
    """p, m, v (n) after one step; steps count from 1. p is the full-precision weight, in bf16 runs too."""
    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    p = p - lr * weight_decay * p
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def split_weight(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y, low (n) from x (n): the nearest bf16, and bits(x) - bits(y) as int16. For float64: x itself and 0."""
    if x.dtype != np.float32:
        return x, np.zeros(x.shape, np.int16)
    bits = x.view(np.uint32)
    high = (bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    return high.view(np.float32), (bits - high).astype(np.uint16).view(np.int16)


def join_weight(y: np.ndarray, low: np.ndarray) -> np.ndarray:
    """x (n) float32: the inverse of split_weight. If low is 0 everywhere, y in its own dtype."""
    if not low.any():
        return y
    bits = y.astype(np.float32).view(np.uint32) + low.astype(np.int32).view(np.uint32)
    return bits.view(np.float32).astype(y.dtype)


def round_weight(x: np.ndarray, nearest: np.ndarray, start: int, seed: int, step: int) -> np.ndarray:
    """x (n) float32, stochastically rounded to one of its two bf16 neighbours, so that the mean is x.

    nearest is x as the working dtype stores it; elements that equal it, or are not finite, stay as they are. Element i
    has index start + i in the flat vector.
    """
    between = np.isfinite(x) & (nearest != x)
    if not between.any():
        return x
    index = np.arange(start, start + x.size, dtype=np.uint64)
    draws = philox4x32(index // np.uint64(4), WEIGHT_STREAM ^ int(step), int(seed))
    draws = np.take_along_axis(draws, (index % np.uint64(4)).astype(np.int64)[:, None], -1)[:, 0]
    bits = x.view(np.uint32)
    rounded = ((bits + (draws & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(between, rounded, x)
