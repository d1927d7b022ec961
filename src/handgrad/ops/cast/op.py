"""cast: float32 weights to the working dtype, without losing a bit. See README.md."""

from typing import Any

from handgrad.core.dtypes import F32, DType
from handgrad.core.op import C, Op, case
from handgrad.ops.cast import reference


class Cast(Op):
    """y = x, rounded to the working dtype;  in bf16 low = the 16 bits that y lacks."""

    name = "cast"
    ins = "x:n:f32"
    outs = "+y:n +low:n:i16?"
    cpu = C("cast", "y low x | n")
    cases = (case(n=33), case(n=1), case(n=7_087_872, real="gpt2-124m, one block"))

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return dtype is not F32

    def ref(self, v: Any) -> tuple:
        return (v.x, None) if v.low is None else reference.cast(v.x)


cast = Cast()
