"""lion: one step of Lion over a slice of the flat parameters. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Launches
from handgrad.ops import updates
from handgrad.ops.adamw.reference import halves, whole_weight
from handgrad.ops.lion import reference


class Lion(Op):
    """Updates p, the momentum m, and low as adamw does.

    `start` is the first element of the slice in the flat vectors, a multiple of 4.

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "lion"
    ins = "grad:n:grad"
    outs = "+p:n +m:n:f32 +low:n:i16?"
    attrs = {"start": int, "beta1": float, "beta2": float, "weight_decay": float}
    cpu = CpuKernel("lion", "p m low grad scalars | n start beta1 beta2 weight_decay")
    cases = (
        case(n=33, start=0, beta1=0.9, beta2=0.99, weight_decay=0.1),
        case(n=1, start=0, beta1=0.95, beta2=0.98, weight_decay=0.0),
        case(n=1031, start=128, beta1=0.9, beta2=0.99, weight_decay=0.1, low=False),
        case(n=640, start=256, beta1=0.9, beta2=0.99, weight_decay=0.1),
        case(n=7_087_872, start=0, beta1=0.9, beta2=0.99, weight_decay=0.1, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start("lion", d)

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.m, v.low
        weight, m = reference.lion(
            whole_weight(v), v.m, v.grad, v.beta1, v.beta2, v.weight_decay, float(k.lr), float(k.grad_scale)
        )
        p, low = halves(v, weight)
        return p, m, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        return updates.launch(c, gpu, "p m low grad scalars | n start weight_decay", defines)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


lion = Lion()
