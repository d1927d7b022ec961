"""gated in numpy: the formulas of README.md. Works in the dtype of its inputs."""

import numpy as np

from handgrad.ops.act import Act
from handgrad.ops.linear.reference import act_forward, act_grad


def gated(x: np.ndarray, act: Act) -> np.ndarray:
    """y (N, M) = act(gate) * up, x: (N, 2 M) = gate | up."""
    gate, up = np.split(x, 2, axis=1)
    return act_forward(gate, act) * up


def gated_backward(dy: np.ndarray, x: np.ndarray, act: Act) -> np.ndarray:
    """dx (N, 2 M), dy: (N, M)."""
    gate, up = np.split(x, 2, axis=1)
    return np.concatenate([dy * up * act_grad(gate, act), dy * act_forward(gate, act)], axis=1)
