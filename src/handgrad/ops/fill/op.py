"""fill: a gradient's start where no kernel writes it first. See README.md."""

from typing import Any

from handgrad.core.op import C, Op, case
from handgrad.ops.fill import reference


class Fill(Op):
    """x = value in the first micro-step; nothing later, where x is being summed."""

    name = "fill"
    outs = "+x:n:f32"
    attrs = {"n": int, "value": float}
    cpu = C("fill", "x | n value knobs")
    cases = (case(n=33, value=0.0), case(n=1, value=2.5), case(n=7_087_872, value=0.0, real="gpt2-124m, one block"))

    def ref(self, v: Any) -> tuple:
        return (reference.fill(v.x, v.value, v.knobs.micro_step),)


fill = Fill()
