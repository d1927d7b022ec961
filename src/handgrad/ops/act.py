"""The activation functions of `linear` and `gated`.

The C kernels get one as a number, a CUDA kernel is compiled for one (-DACT). backends/cpu/include/vmath.h and
backends/cuda/include/activation.cuh have the same numbers; a test compares them.
"""

from enum import IntEnum


class Act(IntEnum):
    """An activation function."""

    NONE = 0
    GELU_TANH = 1  # x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    GELU_ERF = 2  # x/2 (1 + erf(x / sqrt(2)))
    RELU = 3
    SILU = 4  # x / (1 + e^-x)
    TANH = 5
