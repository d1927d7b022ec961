"""cast in numpy. The rounding itself is the dtype's: ml_dtypes.bfloat16 rounds to nearest even as the kernel does."""

import numpy as np


def cast(x: np.ndarray) -> np.ndarray:
    """y = x (n); who stores y rounds it."""
    return x
