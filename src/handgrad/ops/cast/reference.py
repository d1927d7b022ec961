"""cast in numpy, and its inverse, which adamw uses."""

import numpy as np


def cast(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y, low (n) of x (n): the nearest bf16, and what its bits are short of x's (int16). Of float64: x itself and 0."""
    if x.dtype != np.float32:
        return x, np.zeros(x.shape, np.int16)
    bits = x.view(np.uint32)
    high = (bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    return high.view(np.float32), (bits - high).astype(np.uint16).view(np.int16)


def join(y: np.ndarray, low: np.ndarray) -> np.ndarray:
    """x (n): the float32 numbers that cast took apart. With low 0 everywhere, y in its own dtype."""
    if not low.any():
        return y
    bits = y.astype(np.float32).view(np.uint32) + low.astype(np.int32).view(np.uint32)
    return bits.view(np.float32).astype(y.dtype)
