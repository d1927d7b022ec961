"""muon in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np

Round = Callable[[np.ndarray], np.ndarray]


class Polynomial(IntEnum):
    """The steps that orthogonalise: a row of POLYNOMIALS, also in polynomials.h."""

    POLAR_EXPRESS = 0
    NEWTON_SCHULZ = 1


POLYNOMIALS = (
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    ((3.4445, -4.7750, 2.0315),) * 5,
)
MARGINS, NORM_EPS = (1.02, 1.0), (1e-6, 1e-7)
TINY, TINY_ROW = 1e-10, 1e-7


def muon_momentum(m: np.ndarray, grad: np.ndarray, momentum: float, grad_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """m (n) after one step, and u (n): the gradient moved towards it by the same fraction (Nesterov)."""
    g = grad * grad_scale
    m = m + (1 - momentum) * (g - m)
    return m, g + momentum * (m - g)


def orthogonalise(u: np.ndarray, polynomial: int, row_scale: bool, round: Round) -> np.ndarray:
    """o (b, rows, N): nearly the orthogonal factors of the polar decompositions of u (b, rows, N). `round` rounds to
    what a kernel stores."""
    norms = np.sqrt((u * u).sum(2, keepdims=True))
    scale = 1 / np.maximum(norms, TINY_ROW) if row_scale else np.ones_like(norms)
    whole = np.sqrt(((scale * norms) ** 2).sum(1, keepdims=True))
    x = round(u * (scale / (MARGINS[polynomial] * whole + NORM_EPS[polynomial])))
    rows, columns = x.shape[1:]
    for a, b, c in POLYNOMIALS[polynomial]:
        xt = x.transpose(0, 2, 1)
        gram = round(xt @ x if rows > columns else x @ xt)
        p = round(a * np.eye(gram.shape[1], dtype=x.dtype) + b * gram + c * round(gram @ gram))
        x = round(x @ p if rows > columns else p @ x)
    return x


def even_out(o: np.ndarray, v: np.ndarray | None, rescale: bool, beta2: float) -> tuple[np.ndarray, np.ndarray | None]:
    """o (b, rows, N) with the norm of an orthogonal matrix, if `rescale`; then, with v (b, s), divided by the root of
    the mean square of its rows (of its columns, if they are longer), at the same norm. And the next v."""
    axis = 2 if o.shape[1] >= o.shape[2] else 1
    if rescale:
        norm = np.sqrt((o * o).sum((1, 2), keepdims=True))
        o = o * (math.sqrt(min(o.shape[1:])) / np.maximum(norm, TINY))
    if v is None:
        return o, None
    mean = (o * o).mean(axis)
    v = v + (1 - beta2) * (mean - v)
    even = o / np.expand_dims(np.sqrt(np.maximum(v, TINY)), axis)
    before, after = (np.sqrt((x * x).sum((1, 2), keepdims=True)) for x in (o, even))
    return even * (before / np.maximum(after, TINY)), v


def apply(p: np.ndarray, o: np.ndarray, lr: float, scale: float, weight_decay: float, cautious: bool) -> np.ndarray:
    """p after a step against o; with `cautious`, only weights that the step shrinks decay."""
    shrunk = np.where(o * p < 0, p, (1 - lr * weight_decay) * p) if cautious else (1 - lr * weight_decay) * p
    return shrunk - lr * scale * o
