"""share_norm: the L2 norm of one rank's gradients of a bucket. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.global_norm.op import SUM_THREADS, THREADS, sizes
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

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = sizes(c.x, gpu)
        blocks = defines["BLOCKS"]
        return Launches(
            (
                Kernel("share_norm_kernel", "scratch x | n", blocks, THREADS, 0, defines),
                Kernel("share_norm_sum_kernel", "y scratch |", 1, SUM_THREADS, 0, defines),
            ),
            scratch=8 * blocks,
        )


share_norm = ShareNorm()
