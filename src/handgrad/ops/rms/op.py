"""rms: the root mean square of a parameter, by which an optimizer scales its step. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops import updates
from handgrad.ops.rms import reference

SUM_THREADS = 1024  # of the CUDA block that adds all partial sums


class Rms(Op):
    """y = max(least, RMS of p), one number. `count` of the n elements are real; the others are zero."""

    name = "rms"
    ins = "p:n"
    outs = "y:1:f32"
    attrs = {"count": int, "least": float}
    cpu = CpuKernel("rms", "y p scratch | n count least", "rms_scratch n")
    cases = (
        case(n=33, count=33, least=1e-3),
        case(n=1, count=1, least=10.0),
        case(n=20_483, count=20_000, least=1e-3),
        case(n=38_633_472, count=38_597_376, least=1e-3, real="gpt2-124m, token embedding"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.rms(v.p, v.count, v.least),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        blocks = min(-(-c.sizes["n"] // (4 * updates.THREADS)), 4 * gpu.sms)
        vec = 4 if c.sizes["n"] % 4 == 0 else 1
        defines = {"VEC": vec, "BLOCKS": blocks, "SUM_THREADS": SUM_THREADS, "THREADS": updates.THREADS}
        return Launches(
            (
                Kernel("rms_kernel", "scratch p | n", blocks, updates.THREADS, 0, defines),
                Kernel("rms_sum_kernel", "y scratch | count least", 1, SUM_THREADS, 0, defines),
            ),
            scratch=8 * blocks,
        )


rms = Rms()
