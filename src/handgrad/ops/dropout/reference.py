"""dropout in numpy, and its generator, bit-identical to philox.h. See README.md."""

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox4x32(counter_lo: np.ndarray, counter_hi: int, key: int) -> np.ndarray:
    """Four uint32 for each 64-bit counter_lo: shape (*counter_lo.shape, 4). Salmon et al. 2011, section 4.3."""
    counter_lo = np.asarray(counter_lo, np.uint64)
    c0, c1 = counter_lo & LOW, counter_lo >> HALF
    c2, c3 = (np.full_like(c0, half) for half in (counter_hi & 0xFFFFFFFF, counter_hi >> 32))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        m0, m1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = m1 >> HALF ^ c1 ^ np.uint64(k0), m1 & LOW
        c2, c3 = m0 >> HALF ^ c3 ^ np.uint64(k1), m0 & LOW
        k0, k1 = k0 + KEY_STEPS[0] & 0xFFFFFFFF, k1 + KEY_STEPS[1] & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def keep_mask(index: np.ndarray, p: float, seed: int, step: int, micro_step: int, call: int) -> np.ndarray:
    """Whether each element is kept (bool, the shape of index). p is rounded to float32, as in the kernels."""
    index = np.asarray(index, np.uint64)
    stream = int(call) << 48 ^ int(micro_step) << 32 ^ int(step)
    bits = philox4x32(index // np.uint64(4), stream, int(seed))
    lane = (index % np.uint64(4)).astype(np.int64)
    return np.take_along_axis(bits, lane[..., None], -1)[..., 0] >= np.uint32(float(np.float32(p)) * 2.0**32)


def dropout_forward(x: np.ndarray, p: float, call: int, seed: int, step: int, micro_step: int) -> np.ndarray:
    """y (N, C) = x / (1 - p) where kept, 0 elsewhere. The backward is the same function of dy."""
    index = np.arange(x.size, dtype=np.uint64).reshape(x.shape)
    kept = keep_mask(index, p, seed, step, micro_step, call)
    return np.where(kept, x / x.dtype.type(1 - np.float32(p)), x.dtype.type(0))
