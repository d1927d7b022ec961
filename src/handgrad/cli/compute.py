"""Compute: the flags of every verb that reads a model and does not train it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Compute:
    """Precision and backend."""

    dtype: Literal["saved", "f32", "bf16"] = "saved"
    """working dtype; saved: the one it was trained in"""
    backend: Literal["auto", "cpu", "cuda", "ref"] = "auto"
    """auto: cuda where there is a GPU, else cpu; cpu: C kernels; ref: numpy in float64, slow"""
    threads: int = 0
    """CPU threads; 0: the physical cores that this process may use"""

    @property
    def settings(self) -> tuple[str, str, int]:
        """The flags in the order in which the loaders of `handgrad.infer` and `handgrad.evals` take them."""
        return self.dtype, self.backend, self.threads
