"""adamw in numpy: the formulas of README.md. Works in the dtype of its inputs."""

from typing import Any

import numpy as np

from handgrad.ops.dropout.reference import philox4x32

WEIGHT_STREAM = 0xFFFF << 48  # the last of the 2^16 streams; a program numbers its random calls from 1
MOMENT_STREAM = 0xFFFE << 48
BLOCK = 128  # elements that share a scale


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
    factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, m, v (n) after one step; steps count from 1. p is the full-precision weight, in bf16 runs too.
    factor: of the step without the decay."""
    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    p = p - lr * weight_decay * p
    return p - lr * factor * m_hat / (np.sqrt(v_hat) + eps), m, v


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


def whole_weight(v: Any) -> np.ndarray:
    """The weights (n) before the update of a call with the arguments `v`, from p and low."""
    return v.p if v.low is None else join_weight(v.p, v.low)


def halves(v: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """p, low (n) that the call stores of the new weights x: both halves, or without low, rounded stochastically."""
    if v.low is not None:
        return split_weight(x)
    return round_weight(x, v.round(x), v.start, int(v.scalars.seed), int(v.scalars.step)), None


def round_weight(x: np.ndarray, nearest: np.ndarray, start: int, seed: int, step: int) -> np.ndarray:
    """x (n) float32, stochastically rounded to one of its two bf16 neighbours, so that the mean is x.

    nearest is x as the working dtype stores it; elements that equal it, or are not finite, stay as they are. Element i
    has index start + i in the flat vector.
    """
    between = np.isfinite(x) & (nearest != x)
    if not between.any():
        return x
    return np.where(between, round_up_by(x, draw_bits(x.size, start, seed, step)), x)


def draw_bits(n: int, start: int, seed: int, step: int, stream: int = WEIGHT_STREAM) -> np.ndarray:
    """The 32 random bits (n) of elements start, start + 1, ... of a stream."""
    index = np.arange(start, start + n, dtype=np.uint64)
    draws = philox4x32(index // np.uint64(4), stream ^ int(step), int(seed))
    return np.take_along_axis(draws, (index % np.uint64(4)).astype(np.int64)[:, None], -1)[:, 0]


def round_up_by(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """x (n) float32 to bf16: the upper 16 bits of x + the lower 16 of `bits`."""
    return ((x.view(np.uint32) + (bits & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)).view(np.float32)


def moment_bits(n: int, start: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The 16 random bits of m and of v for elements start, start + 1, ..., (n) uint32."""
    bits = draw_bits(n, start, seed, step, MOMENT_STREAM)
    return bits & np.uint32(0xFFFF), bits >> np.uint32(16)


def round_moment(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """x (n) float32 stochastically rounded to bf16; float64 stays."""
    return round_up_by(x, bits) if x.dtype == np.float32 else x


def decode_first(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """m (n) from its codes (n) and the scales of blocks: sign, and the square of 7 bits."""
    q = codes % 128
    signs = np.where(codes < 128, 1.0, -1.0).astype(scales.dtype)
    return signs * np.repeat(scales, BLOCK) * (q * q / scales.dtype.type(127**2))


def decode_second(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """v (n) from its codes (n) and the scales of blocks: the fourth power of 8 bits."""
    return np.repeat(scales, BLOCK) * (codes * codes * codes * codes / scales.dtype.type(255**4))


def encode_first(m: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (n), scales (n / BLOCK) of m."""
    scales = np.abs(m).reshape(-1, BLOCK).max(axis=1)
    q = _round(_fraction(np.abs(m), scales), bits, 127, 2)
    return np.where(m < 0, 128, 0) + q, scales


def encode_second(v: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (n), scales (n / BLOCK) of v; what is above 0 stays above 0."""
    scales = v.reshape(-1, BLOCK).max(axis=1)
    q = _round(_fraction(v, scales), bits, 255, 4)
    return np.where(v > 0, np.maximum(q, 1), 0), scales


def _fraction(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x (n) as a fraction of its block's scale; 0 in a block of zeros."""
    whole = np.repeat(scales, BLOCK)
    return np.divide(x, whole, out=np.zeros_like(x), where=whole > 0)


def _round(a: np.ndarray, bits: np.ndarray, top: int, power: int) -> np.ndarray:
    """q (n) with q^power on one of both sides of a top^power, so that its mean is that."""
    root = np.sqrt(a) if power == 2 else np.sqrt(np.sqrt(a))
    low = np.minimum(np.floor(top * root), top)
    chance = (a * a.dtype.type(top**power) - low**power) / ((low + 1) ** power - low**power)
    return np.minimum(low + (bits * a.dtype.type(2.0**-16) < chance), top)
