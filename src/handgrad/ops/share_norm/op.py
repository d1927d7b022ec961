"""share_norm: the L2 norm of one rank's gradients of a bucket. See README.md."""

from typing import Any

from handgrad.core.op import CpuKernel, Op, case
from handgrad.ops.share_norm import reference


class ShareNorm(Op):
    """y = |x|, one number."""

    name = "share_norm"
    ins = "x:n:grad"
    outs = "+y:M:f32"
    cpu = CpuKernel("share_norm", "y x scratch | n", "share_norm_scratch n")
    cases = (
        case(n=33, M=1),
        case(n=1, M=1),
        case(n=100_003, M=1),
        case(n=3_543_936, M=1, real="gpt2-124m, half a block"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.share_norm(v.x),)


share_norm = ShareNorm()
