"""global_norm: the L2 norm of all gradients and the clip factor. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.core.scalars import STEP_SCALARS_BYTES
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.global_norm import reference

THREADS, SUM_THREADS = 256, 1024  # of a CUDA block; of the one that adds all partial sums


def sizes(grad: Tensor, gpu: Gpu) -> dict[str, int]:
    """The sizes of the kernels that add up the squares of these gradients: what squares.cuh needs."""
    vec = 16 // grad.dtype.size
    vec = vec if grad.size % vec == 0 else 1
    blocks = min(-(-grad.size // (THREADS * vec)), 8 * gpu.sms)
    return {"VEC": vec, "BLOCKS": blocks, "THREADS": THREADS, "SUM_THREADS": SUM_THREADS}


class GlobalNorm(Op):
    """scalars.grad_norm = |grad|;  scalars.grad_scale = min(1, clip / (|grad| + 1e-6)), 1 if clip is 0.

    If the norm is not finite the scale is 0: no update.
    """

    name = "global_norm"
    ins = "grad:n:grad"
    outs = f"+scalars:{STEP_SCALARS_BYTES}:byte"
    attrs = {"clip": float}
    cpu = CpuKernel("global_norm", "scalars grad scratch | n clip", "global_norm_scratch n")
    cases = (
        case(n=33, clip=1.0),
        case(n=1, clip=0.0),
        case(n=100_003, clip=1e3),
        case(n=70_000, clip=1.0),
        case(n=124_475_904, clip=1.0, real="gpt2-124m"),
    )

    def ref(self, v: Any) -> tuple:
        v.scalars.grad_norm, v.scalars.grad_scale = reference.global_norm(v.grad, v.clip)
        return (None,)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = sizes(c.grad, gpu)
        blocks = defines["BLOCKS"]
        return Launches(
            (
                Kernel("global_norm_kernel", "scratch grad | n", blocks, THREADS, 0, defines),
                Kernel("global_norm_sum_kernel", "scalars scratch | clip", 1, SUM_THREADS, 0, defines),
            ),
            scratch=8 * blocks,
        )


global_norm = GlobalNorm()
