"""rope in numpy: the formulas of README.md, and the table of angles. The ops work in the dtype of their inputs."""

import numpy as np

# factor, low_freq_factor, high_freq_factor, original_max_position: the scaling of Llama 3.1 and later
Llama3Scaling = tuple[float, ...]


def rotary_table(S: int, R: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """(S, R) f32: row s has the cosines, then the sines, of s theta^(-2 i / R) for i < R / 2.

    scaling: frequencies of a wavelength above original_max_position / low_freq_factor are divided by factor, those
    below original_max_position / high_freq_factor stay, and those between are blended. Angles are float64.
    """
    frequency = theta ** (-np.arange(0, R, 2) / R)
    if scaling is not None:
        factor, low, high, original = scaling
        kept = np.clip((original * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / factor
    angles = np.arange(S)[:, None] * frequency
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rotate(x: np.ndarray, table: np.ndarray, T: int, position: int, interleaved: bool, sign: int = 1) -> np.ndarray:
    """Every pair of the first R columns of x (N, heads, D), turned by sign times the angle of its row's position."""
    N, _, D = x.shape
    R = table.shape[1]
    c, s = np.split(table[position + np.arange(N) % T][:, None], 2, axis=-1)
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    y = x.copy()
    y[..., first] = x[..., first] * c - sign * x[..., second] * s
    y[..., second] = x[..., second] * c + sign * x[..., first] * s
    return y


def heads(qkv: np.ndarray, H: int, K: int) -> list[np.ndarray]:
    """q (N, H, D), k (N, K, D), v (N, K, D) of qkv (N, (H + 2 K) D)."""
    N, Q = qkv.shape
    return np.split(qkv.reshape(N, H + 2 * K, Q // (H + 2 * K)), [H, H + K], axis=1)


def norm(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(x rstd, rstd) of the RMS norm over the last axis, without a weight."""
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + x.dtype.type(eps))
    return x * rstd, rstd


def rope_forward(
    qkv: np.ndarray,
    table: np.ndarray,
    wq: np.ndarray | None,
    wk: np.ndarray | None,
    T: int,
    H: int,
    K: int,
    eps: float,
    interleaved: bool,
    position: int = 0,
) -> np.ndarray:
    """y (N, Q): q and k of qkv (N, Q) normed where a weight (D) is given, then rotated; v as it is."""
    q, k, v = heads(qkv, H, K)
    q, k = (x if w is None else norm(x, eps)[0] * w for x, w in ((q, wq), (k, wk)))
    q, k = (rotate(x, table, T, position, interleaved) for x in (q, k))
    return np.concatenate([q, k, v], axis=1).reshape(qkv.shape)


def rope_backward(
    dy: np.ndarray,
    qkv: np.ndarray | None,
    table: np.ndarray,
    wq: np.ndarray | None,
    wk: np.ndarray | None,
    T: int,
    H: int,
    K: int,
    eps: float,
    interleaved: bool,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """dqkv (N, Q), dwq (D), dwk (D); qkv only where a weight is given."""
    *rotated, dv = heads(dy, H, K)
    outs, dws = [], []
    for dz, x, w in zip(rotated, [None, None] if qkv is None else heads(qkv, H, K), (wq, wk)):
        d, dw = rotate(dz, table, T, 0, interleaved, sign=-1), None
        if w is not None and x is not None:
            n, rstd = norm(x, eps)
            dw = (d * n).sum((0, 1))
            d = d * w
            d = rstd * (d - n * (d * n).mean(-1, keepdims=True))
        outs.append(d)
        dws.append(dw)
    return np.concatenate([*outs, dv], axis=1).reshape(dy.shape), dws[0], dws[1]
