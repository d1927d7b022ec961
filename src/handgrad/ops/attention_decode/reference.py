"""attention_decode in numpy: the formulas of README.md."""

import numpy as np

from handgrad.ops.attention.reference import bucket, join_heads, split_heads


def attention_decode(
    cache: np.ndarray,
    qkv: np.ndarray,
    rel: np.ndarray | None,
    T: int,
    H: int,
    window: int,
    scale: float,
    position: int,
) -> tuple[np.ndarray, np.ndarray]:
    """y (N, H D) and the new cache (B, S, 2, K, D) from qkv (N, (H + 2 K) D): T tokens a sequence, from `position`."""
    B, _, _, K, D = cache.shape
    end = position + T
    cache = cache.copy()
    cache[:, position:end] = qkv[:, H * D :].reshape(B, T, 2, K, D)
    q = split_heads(qkv[:, : H * D], T, H)
    k, v = (cache[:, :end, i].swapaxes(1, 2).repeat(H // K, axis=1) for i in (0, 1))
    query, key = np.arange(position, end)[:, None], np.arange(end)
    seen = (key <= query) & ((key > query - window) if window else True)
    s = q @ k.swapaxes(-1, -2) * np.float32(scale)
    if rel is not None:  # (R, H)
        by_distance = np.array([bucket(-d, len(rel), causal=True) for d in range(end)])
        s = s + rel[by_distance[np.maximum(query - key, 0)]].transpose(2, 0, 1)
    s = np.where(seen, s, -np.inf).astype(q.dtype)
    probs = np.exp(s - s.max(-1, keepdims=True))
    return join_heads(probs / probs.sum(-1, keepdims=True) @ v).astype(qkv.dtype), cache
