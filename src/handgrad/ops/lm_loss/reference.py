"""lm_loss in numpy: softmax cross entropy of x w^T against targets, with its gradient. See README.md."""

from collections.abc import Callable

import numpy as np

Keep = Callable[[np.ndarray], np.ndarray]  # rounds values as storing them in the logits workspace does


def cross_entropy(logits: np.ndarray, targets: np.ndarray, ignore_index: int) -> np.ndarray:
    """losses (N) in nats from logits (N, V) and targets (N). Ignored targets give 0."""
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    counts = targets != ignore_index
    picked = logits[np.arange(len(logits)), np.where(counts, targets, 0)]
    return np.where(counts, lse - picked, 0)


def lm_loss_forward(
    x: np.ndarray, w: np.ndarray, targets: np.ndarray, V: int, ignore_index: int, keep: Keep
) -> np.ndarray:
    """losses (N); x (N, C), w (Vp, C) of which V rows count, targets (N)."""
    return cross_entropy(keep(x @ w[:V].T), targets, ignore_index)


def lm_loss_forward_backward(
    x: np.ndarray, w: np.ndarray, targets: np.ndarray, V: int, ignore_index: int, loss_scale: float, keep: Keep
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """losses (N), dx (N, C), dw (Vp, C): gradients of loss_scale * sum of losses."""
    logits = keep(x @ w[:V].T)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counts = targets != ignore_index
    p[np.arange(len(x)), np.where(counts, targets, 0)] -= 1
    dlogits = keep(p * (counts * x.dtype.type(loss_scale))[:, None])
    dw = np.zeros_like(w)
    dw[:V] = dlogits.T @ x
    return cross_entropy(logits, targets, ignore_index), dlogits @ w[:V], dw
