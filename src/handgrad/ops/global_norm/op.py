"""global_norm: the L2 norm of all gradients and the clip factor. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.core.scalars import STEP_SCALARS_BYTES
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.global_norm import reference

THREADS, SUM_THREADS = 256, 1024  # of a CUDA block; of the one that adds all partial sums


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
        n, vec = c.sizes["n"], 16 // c.grad.dtype.size
        vec = vec if n % vec == 0 else 1
        blocks = min(-(-n // (THREADS * vec)), 8 * gpu.sms)
        defines = {"VEC": vec, "BLOCKS": blocks, "THREADS": THREADS, "SUM_THREADS": SUM_THREADS}
        return Launches(
            (
                Kernel("global_norm_kernel", "scratch grad | n", blocks, THREADS, 0, defines),
                Kernel("global_norm_sum_kernel", "scalars scratch | clip", 1, SUM_THREADS, 0, defines),
            ),
            scratch=8 * blocks,
        )


global_norm = GlobalNorm()
