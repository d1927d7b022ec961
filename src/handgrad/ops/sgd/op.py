"""sgd: one step of SGD over a slice of the flat parameters. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Launches
from handgrad.ops import updates
from handgrad.ops.adamw.reference import halves, whole_weight
from handgrad.ops.sgd import reference


class Sgd(Op):
    """Updates p, the momentum m, which is absent where there is none, and low as adamw does.

    `start` is the first element of the slice in the flat vectors, a multiple of 4.

    Reads lr, momentum, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "sgd"
    ins = "grad:n:grad"
    outs = "+p:n +m:n:f32? +low:n:i16?"
    attrs = {"start": int, "nesterov": bool, "weight_decay": float}
    cpu = CpuKernel("sgd", "p m low grad scalars | n start nesterov weight_decay")
    cases = (
        case(n=33, start=0, nesterov=False, weight_decay=0.1),
        case(n=1, start=0, nesterov=False, weight_decay=0.0, without="m"),
        case(n=1031, start=128, nesterov=True, weight_decay=0.1, low=False),
        case(n=640, start=256, nesterov=True, weight_decay=0.1),
        case(n=640, start=256, nesterov=False, weight_decay=0.1, low=False, without="m"),
        case(n=7_087_872, start=0, nesterov=False, weight_decay=0.1, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start("sgd", d)

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return out == "m" or updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.m, v.low
        weight, m = reference.sgd(
            whole_weight(v),
            v.m,
            v.grad,
            float(k.momentum),
            v.nesterov,
            v.weight_decay,
            float(k.lr),
            float(k.grad_scale),
        )
        p, low = halves(v, weight)
        return p, m, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"MOMENTUM": int(c.m is not None), "NESTEROV": int(c.attrs["nesterov"])}
        return updates.launch(c, gpu, "p m low grad scalars | n start weight_decay", defines)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


sgd = Sgd()
