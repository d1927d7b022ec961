"""attention in numpy: the formulas of README.md, with the (T, T) matrices materialised."""

import numpy as np

from handgrad.ops.dropout.reference import keep_mask


def split_heads(x: np.ndarray, T: int, H: int) -> np.ndarray:
    """(B, H, T, D) from (B T, H D)."""
    return x.reshape(-1, T, H, x.shape[-1] // H).swapaxes(1, 2)


def join_heads(x: np.ndarray) -> np.ndarray:
    """(B T, H D) from (B, H, T, D)."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B * T, H * D)


def split_qkv(qkv: np.ndarray, T: int, H: int, K: int) -> list[np.ndarray]:
    """q, k, v (B, H, T, D) from (B T, (H + 2 K) D): index h of k and v holds key/value head h / (H / K)."""
    D = qkv.shape[-1] // (H + 2 * K)
    q, k, v = (split_heads(x, T, x.shape[-1] // D) for x in np.split(qkv, [H * D, (H + K) * D], axis=-1))
    return [q, k.repeat(H // K, axis=1), v.repeat(H // K, axis=1)]


def sum_groups(dx: np.ndarray, K: int) -> np.ndarray:
    """(B, K, T, D): the gradient of a key/value head is the sum over the query heads that read it."""
    B, H, T, D = dx.shape
    return dx.reshape(B, K, H // K, T, D).sum(2)


def scores(q: np.ndarray, k: np.ndarray, causal: bool = True) -> np.ndarray:
    """q k' / sqrt(D), -inf where a query must not attend: if causal, query t sees keys 0 .. t + (keys - queries)."""
    s = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]).astype(q.dtype)
    if not causal:
        return s
    return np.where(np.tri(s.shape[-2], s.shape[-1], s.shape[-1] - s.shape[-2], dtype=bool), s, -np.inf).astype(s.dtype)


def dropout_factors(
    shape: tuple[int, ...], p: float, call: int, seed: int, step: int, micro_step: int
) -> np.ndarray | float:
    """1 / (1 - p) where a probability is kept, 0 where it is dropped; elements are numbered in row-major order."""
    if p == 0:
        return 1.0
    index = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64)
    return keep_mask(index, p, seed, step, micro_step, call).reshape(shape) / (1 - np.float64(np.float32(p)))


def attention_forward(
    qkv: np.ndarray,
    T: int,
    H: int,
    K: int,
    causal: bool = True,
    p: float = 0.0,
    call: int = 0,
    seed: int = 0,
    step: int = 0,
    micro_step: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """y (N, H D) and lse (B, H, T) from qkv (N, (H + 2 K) D)."""
    q, k, v = split_qkv(qkv, T, H, K)
    s = scores(q, k, causal)
    top = s.max(-1)
    lse = top + np.log(np.exp(s - top[..., None]).sum(-1))
    probs = np.exp(s - lse[..., None]) * dropout_factors(s.shape, p, call, seed, step, micro_step)
    return join_heads(probs @ v).astype(qkv.dtype), lse


def attention_backward(
    dy: np.ndarray,
    qkv: np.ndarray,
    y: np.ndarray,
    lse: np.ndarray,
    T: int,
    H: int,
    K: int,
    causal: bool = True,
    p: float = 0.0,
    call: int = 0,
    seed: int = 0,
    step: int = 0,
    micro_step: int = 0,
) -> np.ndarray:
    """dqkv (N, (H + 2 K) D) from dy (N, H D) and the forward's input and outputs."""
    q, k, v = split_qkv(qkv, T, H, K)
    dy, y = split_heads(dy, T, H), split_heads(y, T, H)
    probs = np.exp(scores(q, k, causal) - lse[..., None])
    kept = dropout_factors(probs.shape, p, call, seed, step, micro_step)
    dv = (probs * kept).swapaxes(-1, -2) @ dy
    dprobs = (dy @ v.swapaxes(-1, -2)) * kept
    delta = (dy * y).sum(-1, keepdims=True)
    ds = probs * (dprobs - delta) / np.sqrt(q.shape[-1])
    dq, dk = ds @ k, ds.swapaxes(-1, -2) @ q
    grads = dq, sum_groups(dk, K), sum_groups(dv, K)
    return np.concatenate([join_heads(dx) for dx in grads], axis=-1).astype(qkv.dtype)
