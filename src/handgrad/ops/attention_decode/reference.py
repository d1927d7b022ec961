"""attention_decode in numpy: the math as it is written in README.md."""

import numpy as np

from handgrad.ops.attention.reference import join_heads, scores, split_heads


def attention_decode(cache: np.ndarray, qkv: np.ndarray, Tq: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """y (N, H D) and the new cache (B, S_max, 2, H, D) from qkv (N, 3 H D) of Tq tokens at `position` of each sequence."""
    B, _, _, H, D = cache.shape
    end = position + Tq
    cache = cache.copy()
    cache[:, position:end] = qkv.reshape(B, Tq, 3, H, D)[:, :, 1:]
    q = split_heads(qkv[:, : H * D], Tq, H)
    k, v = (cache[:, :end, i].swapaxes(1, 2) for i in (0, 1))
    s = scores(q, k)
    probs = np.exp(s - s.max(-1, keepdims=True))
    return join_heads(probs / probs.sum(-1, keepdims=True) @ v).astype(qkv.dtype), cache
