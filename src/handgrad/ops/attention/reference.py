"""attention in numpy: the formulas of README.md, with the (T, S) matrices materialised."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from handgrad.ops.dropout.reference import keep_mask

FAR = 128  # distances from here on share a bucket


def split_heads(x: np.ndarray, T: int, H: int) -> np.ndarray:
    """(B, H, T, D) from (B T, H D)."""
    return x.reshape(-1, T, H, x.shape[-1] // H).swapaxes(1, 2)


def join_heads(x: np.ndarray) -> np.ndarray:
    """(B T, H D) from (B, H, T, D)."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B * T, H * D)


def split_qkv(v: Any) -> list[np.ndarray]:
    """q (B, H, T, D), k, v (B, H, S, D), from qkv or from qkv and kv: index h of k and v holds key/value head
    h / (H / K)."""
    D, K = v.D, v.K
    packed = v.qkv[:, v.H * D :] if v.kv is None else v.kv
    k, values = (split_heads(x, v.S, K).repeat(v.H // K, axis=1) for x in np.split(packed, 2, axis=-1))
    return [split_heads(v.qkv[:, : v.H * D], v.T, v.H), k, values]


def sum_groups(dx: np.ndarray, K: int) -> np.ndarray:
    """(B, K, S, D): the gradient of a key/value head is the sum over the query heads that read it."""
    B, H, S, D = dx.shape
    return dx.reshape(B, K, H // K, S, D).sum(2)


def visible(v: Any) -> np.ndarray:
    """(B, 1, T, S): whether a query sees a key, by causal, window, first_key and last_key."""
    t, s = np.arange(v.T)[:, None], np.arange(v.S)
    seen = np.full((v.B, 1, v.T, v.S), True)
    if v.causal:
        seen &= s <= t
    if v.window:
        seen &= s > t - v.window
    if v.first_key is not None:
        seen &= s >= v.first_key.reshape(v.B, 1, v.T, 1)
    if v.last_key is not None:
        seen &= s <= v.last_key.reshape(v.B, 1, v.T, 1)
    return seen


def distance_bucket(n: int, count: int) -> int:
    """The bucket of a distance n >= 0 among `count`, in whole numbers: exact below count / 2, then
    count / 2 (1 + log(n / (count / 2)) / log(FAR / (count / 2))), rounded down, at most count - 1."""
    exact = count // 2
    rest = count - exact
    return min(n, exact) + sum(n**rest * exact**j >= exact**rest * FAR**j for j in range(1, rest))


def bucket(distance: int, R: int, causal: bool) -> int:
    """The row of `rel` for a distance key - query. Not causal: the second half is for keys after the query."""
    if causal:
        return distance_bucket(max(-distance, 0), R)
    return distance_bucket(abs(distance), R // 2) + (R // 2 if distance > 0 else 0)


def buckets(v: Any) -> np.ndarray:
    """(T, S) of every query and key."""
    table = np.array([bucket(d, v.rel.shape[0], v.causal) for d in range(-v.T + 1, v.S)])
    return table[np.arange(v.S) - np.arange(v.T)[:, None] + v.T - 1]


def scores(v: Any, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """scale q k' + bias (B, H, T, S), -inf where a query does not see a key."""
    s = q @ k.swapaxes(-1, -2) * np.float32(v.scale)
    if v.rel is not None:
        s = s + v.rel[buckets(v)].transpose(2, 0, 1)
    return np.where(visible(v), s, -np.inf).astype(s.dtype)


def dropout_factors(v: Any, shape: tuple[int, ...]) -> np.ndarray | float:
    """1 / (1 - p) where a probability is kept, 0 where it is dropped; elements are numbered in row-major order."""
    if v.p == 0:
        return 1.0
    index, k = np.arange(np.prod(shape, dtype=np.uint64), dtype=np.uint64), v.scalars
    kept = keep_mask(index, v.p, k.seed, k.step, k.micro_step, v.stream)
    return kept.reshape(shape) / (1 - np.float64(np.float32(v.p)))


def attention_forward(v: Any) -> tuple[np.ndarray, np.ndarray]:
    """y (N, H D) and lse (B, H, T); both 0 for a query that sees nothing."""
    q, k, values = split_qkv(v)
    s = scores(v, q, k)
    top = s.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    total = np.exp(s - top).sum(-1, keepdims=True)
    lse = np.where(total > 0, top + np.log(np.where(total > 0, total, 1)), 0)
    probs = np.exp(s - lse) * dropout_factors(v, s.shape)
    return join_heads(probs @ values).astype(v.qkv.dtype), lse[..., 0]


def attention_backward(v: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """dqkv, dkv and drel, as qkv, kv and rel, from dy (N, H D) and the forward's inputs and outputs."""
    q, k, values = split_qkv(v)
    dy, y = split_heads(v.dy, v.T, v.H), split_heads(v.y, v.T, v.H)
    probs = np.exp(scores(v, q, k) - v.lse[..., None])
    kept = dropout_factors(v, probs.shape)
    dv = (probs * kept).swapaxes(-1, -2) @ dy
    dprobs = (dy @ values.swapaxes(-1, -2)) * kept
    dz = probs * (dprobs - (dy * y).sum(-1, keepdims=True))
    ds = dz * np.float32(v.scale)
    dq, dk = join_heads(ds @ k), sum_groups(ds.swapaxes(-1, -2) @ q, v.K)
    dkv = np.concatenate([join_heads(dk), join_heads(sum_groups(dv, v.K))], axis=-1)
    drel = None
    if v.rel is not None:
        drel = np.zeros(v.rel.shape)
        np.add.at(drel, buckets(v), dz.sum(0).transpose(1, 2, 0))
    if v.kv is None:
        return np.concatenate([dq, dkv], axis=-1).astype(v.qkv.dtype), None, drel
    return dq.astype(v.qkv.dtype), dkv.astype(v.qkv.dtype), drel


def sample(name: str, v: dict[str, Any]) -> np.ndarray | None:
    """An input of a check. None: any values do.

    first_key, last_key (N): in each sequence documents of random lengths, a run of rows that see nothing, and at its
    end rows in reverse order. y, lse: the forward's outputs for these inputs, with the step scalars of every check.
    """
    if name in ("y", "lse"):
        absent: dict[str, Any] = dict.fromkeys(("kv", "rel", "first_key", "last_key"))
        scalars = SimpleNamespace(seed=7, step=3, micro_step=0)
        return attention_forward(SimpleNamespace(**absent | v, scalars=scalars))[name == "lse"]
    if name not in ("first_key", "last_key"):
        return None
    B, T, S = v["B"], v["T"], v["S"]
    rng, bounds = np.random.default_rng(B * T), np.empty((B, T), np.int64)
    for b in range(B):
        edges = np.array([0, *np.sort(rng.integers(0, S, 3)), S])
        document = np.searchsorted(edges, np.arange(T) * S // T, "right") - 1
        bounds[b] = edges[document] if name == "first_key" else edges[document + 1] - 1
        bounds[b, -(T // 5) :] = bounds[b, -(T // 5) :][::-1].copy()
        nothing = rng.integers(T // 2)
        bounds[b, nothing : nothing + max(1, T // 7)] = S if name == "first_key" else -1
    return bounds.reshape(-1)
