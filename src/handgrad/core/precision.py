"""Precision: the element types of weights, activations and gradients."""

from dataclasses import dataclass

from handgrad.core.dtypes import BF16, DTYPES, F32, DType
from handgrad.core.errors import HandgradError

WORDS = ("f32", "tf32", "bf16")
GRAD_WORDS = ("f32", "bf16")


@dataclass(frozen=True)
class Precision:
    """The number formats of a run, for recording, backends, training, explaining and profiling.

    dtype            "f32", "bf16", or "tf32": float32 whose matmuls round operands to 10 mantissa bits, on a GPU
    grad_dtype       of parameter gradients: "f32", or "bf16" on a GPU
    master_weights   bf16 weights also keep the low 16 bits of their float32; without, updates round stochastically
    deterministic    bit-identical runs, for every recompute policy; slower on a GPU, always so on other backends

    Raises HandgradError for any other name.

    >>> Precision("tf32").working is F32, Precision("bf16").splits_weights
    (True, True)
    """

    dtype: str = "f32"
    grad_dtype: str = "f32"
    master_weights: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", WORDS), ("grad_dtype", GRAD_WORDS)):
            if getattr(self, name) not in known:
                raise HandgradError("precision", f"{name} is one of {', '.join(known)}", f"'{getattr(self, name)}'")

    @property
    def working(self) -> DType:
        """The element type of weights and activations."""
        return F32 if self.tf32 else DTYPES[self.dtype]

    @property
    def gradients(self) -> DType:
        """The element type of parameter gradients."""
        return DTYPES[self.grad_dtype]

    @property
    def tf32(self) -> bool:
        """Whether float32 matmuls may round their operands."""
        return self.dtype == "tf32"

    @property
    def splits_weights(self) -> bool:
        """Whether a weight is stored as a bf16 and the low 16 bits of its float32."""
        return self.working is BF16 and self.master_weights
