"""global_norm: the L2 norm of all gradients and the factor that clips it. See README.md."""

from typing import Any

from handgrad.core.knobs import KNOBS_BYTES
from handgrad.core.op import C, Op, case
from handgrad.ops.global_norm import reference


class GlobalNorm(Op):
    """knobs.grad_norm = |grad|;  knobs.grad_scale = min(1, clip / (|grad| + 1e-6)), 1 where clip is 0."""

    name = "global_norm"
    ins = "grad:n:f32"
    outs = f"+knobs:{KNOBS_BYTES}:byte"
    attrs = {"clip": float}
    cpu = C("global_norm", "knobs grad | n clip scratch", "global_norm_scratch n")
    cases = (
        case(n=33, clip=1.0),
        case(n=1, clip=0.0),
        case(n=100_003, clip=1e3),
        case(n=124_475_904, clip=1.0, real="gpt2-124m"),
    )

    def ref(self, v: Any) -> tuple:
        v.knobs.grad_norm, v.knobs.grad_scale = reference.global_norm(v.grad, v.clip)
        return (None,)


global_norm = GlobalNorm()
