"""Element types: name, bytes, and the unit roundoff that tolerances are derived from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """An element type. `unit` is the relative rounding error of one operation (0 for integers)."""

    name: str
    size: int
    unit: float

    def __str__(self) -> str:
        return self.name


F32 = DType("f32", 4, 2.0**-24)
BF16 = DType("bf16", 2, 2.0**-8)
I32 = DType("i32", 4, 0.0)
I16 = DType("i16", 2, 0.0)
BYTE = DType("byte", 1, 0.0)

DTYPES = {d.name: d for d in (F32, BF16, I32, I16, BYTE)}
