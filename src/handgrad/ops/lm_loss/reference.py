"""lm_loss in numpy: softmax cross entropy of logits against targets, with its gradient. See README.md.

`v` holds the inputs, sizes and attributes of the op. `v.round` rounds values as storing them in the logits does.
"""

from typing import Any

import numpy as np


def logits(v: Any) -> np.ndarray:
    """z (N, V) = cap(scale (x w^T + b)); x (N, C), w (Vp, C) and b (Vp) or None, of which V rows count."""
    z = v.round(v.x @ v.w[: v.V].T)
    z = (z if v.b is None else z + v.b[: v.V]) * v.scale
    return v.round(v.softcap * np.tanh(z / v.softcap) if v.softcap else z)


def cross_entropy(z: np.ndarray, v: Any) -> np.ndarray:
    """losses (N) in nats from logits (N, V) and targets (N). Ignored targets give 0."""
    top = z.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[:, 0]
    counts = v.targets != v.ignore_index
    picked = z[np.arange(len(z)), np.where(counts, v.targets, 0)]
    return np.where(counts, lse - picked, 0) * (1 if v.weights is None else v.weights)


def lm_loss_forward(v: Any) -> np.ndarray:
    """losses (N)."""
    return cross_entropy(logits(v), v)


def lm_loss_forward_backward(v: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """losses (N), dx (N, C), dw (Vp, C), db (Vp): gradients of loss_scale * sum of losses."""
    z = logits(v)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counts = v.targets != v.ignore_index
    p[np.arange(len(z)), np.where(counts, v.targets, 0)] -= 1
    factor = counts * v.x.dtype.type(v.scalars.loss_scale) * (1 if v.weights is None else v.weights)
    slope = v.scale * (np.maximum(1 - (z / v.softcap) ** 2, 0) if v.softcap else 1)  # d z / d (x w^T)
    dz = v.round(p * factor[:, None] * slope)
    dw, db = np.zeros_like(v.w), np.zeros_like(v.w[:, 0])
    dw[: v.V], db[: v.V] = dz.T @ v.x, dz.sum(0)
    return cross_entropy(z, v), dz @ v.w[: v.V], dw, db
