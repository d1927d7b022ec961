"""cast: float32 to the working dtype. See README.md."""

from typing import Any

from handgrad.core.op import C, Op, case
from handgrad.ops.cast import reference


class Cast(Op):
    """y = x, rounded to nearest even."""

    name = "cast"
    ins = "x:n:f32"
    outs = "+y:n"
    cpu = C("cast", "y x | n")
    cases = (case(n=33), case(n=1), case(n=7_087_872, real="gpt2-124m, one block"))

    def ref(self, v: Any) -> tuple:
        return (reference.cast(v.x),)


cast = Cast()
