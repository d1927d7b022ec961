"""linear in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import math

import numpy as np

from handgrad.ops.act import Act

GELU_K = np.sqrt(2 / np.pi)
GELU_C = 0.044715


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GPT-2's tanh form of GELU."""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(GELU_K) * (x + x.dtype.type(GELU_C) * x**3)))


def gelu_tanh_grad(x: np.ndarray) -> np.ndarray:
    """d gelu_tanh / dx."""
    t = np.tanh(x.dtype.type(GELU_K) * (x + x.dtype.type(GELU_C) * x**3))
    inner = x.dtype.type(GELU_K) * (1 + 3 * x.dtype.type(GELU_C) * x**2)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """(1 + erf(x / sqrt(2))) / 2, as erfc, which does not cancel for negative x; computed in float64."""
    erfc = np.frompyfunc(math.erfc, 1, 1)
    return (0.5 * erfc(-np.sqrt(0.5) * x.astype(np.float64)).astype(np.float64)).astype(x.dtype)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), from e^-|x|, which does not overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def act_forward(x: np.ndarray, act: Act) -> np.ndarray:
    """act(x), elementwise."""
    match act:
        case Act.NONE:
            return x
        case Act.GELU_TANH:
            return gelu_tanh(x)
        case Act.GELU_ERF:
            return x * normal_cdf(x)
        case Act.RELU:
            return np.maximum(x, 0)
        case Act.SILU:
            return x * sigmoid(x)
        case Act.TANH:
            return np.tanh(x)


def act_grad(x: np.ndarray, act: Act) -> np.ndarray:
    """act'(x), elementwise; relu'(0) is 0."""
    match act:
        case Act.NONE:
            return np.ones_like(x)
        case Act.GELU_TANH:
            return gelu_tanh_grad(x)
        case Act.GELU_ERF:
            return normal_cdf(x) + x * np.exp(-0.5 * x**2) * x.dtype.type(1 / np.sqrt(2 * np.pi))
        case Act.RELU:
            return (x > 0).astype(x.dtype)
        case Act.SILU:
            s = sigmoid(x)
            return s * (1 + x * (1 - s))
        case Act.TANH:
            return 1 - np.tanh(x) ** 2


def act_backward(dy: np.ndarray, x: np.ndarray, act: Act) -> np.ndarray:
    """dx = dy * act'(x)."""
    return dy * act_grad(x, act)


def linear_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """y (N, M) = x (N, K) w^T + b, w: (M, K)."""
    y = x @ w.T
    return y if b is None else y + b


def linear_backward_w(dy: np.ndarray, x: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
    """dw (M, K) = dy^T x, None without x;  db (M) = sum of dy over rows."""
    return None if x is None else dy.T @ x, dy.sum(0)


def linear_backward_x(dy: np.ndarray, w: np.ndarray, dx0: np.ndarray | None) -> np.ndarray:
    """dx (N, K) = dx0 + dy w."""
    return dy @ w if dx0 is None else dx0 + dy @ w
