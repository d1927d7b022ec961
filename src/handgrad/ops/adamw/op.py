"""adamw: one step of AdamW over a flat stretch of parameters. See README.md."""

from typing import Any

from handgrad.core.dtypes import F32, DType
from handgrad.core.op import C, Op, case
from handgrad.ops.adamw import reference
from handgrad.ops.cast.reference import cast, join


class AdamW(Op):
    """Updates p, m, v and, in bf16, low: the 16 bits of the float32 weight that p lacks.

    Reads lr, step and grad_scale from knobs.
    """

    name = "adamw"
    ins = "grad:n:f32"
    outs = "+p:n +m:n:f32 +v:n:f32 +low:n:i16?"
    attrs = {"beta1": float, "beta2": float, "eps": float, "weight_decay": float}
    cpu = C("adamw", "p m v low grad | n beta1 beta2 eps weight_decay knobs")
    cases = (
        case(n=33, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
        case(n=1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0),
        case(n=4099, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
        case(n=7_087_872, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, real="gpt2-124m, one block"),
    )

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return dtype is not F32  # in f32 p is the whole weight

    def ref(self, v: Any) -> tuple:
        k, weight = v.knobs, v.p if v.low is None else join(v.p, v.low)
        weight, m, s = reference.adamw(
            weight,
            v.m,
            v.v,
            v.grad,
            v.beta1,
            v.beta2,
            v.eps,
            v.weight_decay,
            float(k.lr),
            int(k.step),
            float(k.grad_scale),
        )
        p, low = (weight, None) if v.low is None else cast(weight)
        return p, m, s, low

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name == "low":
            return rng.integers(-(1 << 15), 1 << 15, shape, dtype="int16")
        return rng.random(shape) if arg.name == "v" else None  # a mean of squares


adamw = AdamW()
