"""cap_logits in numpy. See README.md."""

import numpy as np


def cap_logits(z: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """softcap tanh(scale z / softcap), or scale z where softcap is 0."""
    z = z * scale
    return softcap * np.tanh(z / softcap) if softcap else z
