"""linear in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np

GELU_K = np.sqrt(2 / np.pi)
GELU_C = 0.044715


def gelu(x: np.ndarray) -> np.ndarray:
    """GPT-2's tanh form of GELU."""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(GELU_K) * (x + x.dtype.type(GELU_C) * x**3)))


def gelu_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dy * gelu'(x)."""
    t = np.tanh(x.dtype.type(GELU_K) * (x + x.dtype.type(GELU_C) * x**3))
    inner = x.dtype.type(GELU_K) * (1 + 3 * x.dtype.type(GELU_C) * x**2)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner)


def linear_forward(x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """y (N, M) = x (N, K) w^T + b, w: (M, K)."""
    y = x @ w.T
    return y if b is None else y + b


def linear_backward_w(dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dw (M, K) = dy^T x;  db (M) = sum of dy over rows."""
    return dy.T @ x, dy.sum(0)


def linear_backward_x(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """dx (N, K) = dy w."""
    return dy @ w
