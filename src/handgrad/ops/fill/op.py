"""fill: a gradient with one value everywhere. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.fill import reference

THREADS = 256  # of a CUDA block


class Fill(Op):
    """x = value; x += value if x already holds a value of this step."""

    name = "fill"
    outs = "+x:n:grad"
    attrs = {"n": int, "value": float}
    cpu = CpuKernel("fill", "x | n value accumulate.x")
    cases = (
        case(n=33, value=0.0),
        case(n=1, value=2.5),
        case(n=6400, value=-1.0),
        case(n=7_087_872, value=0.0, real="gpt2-124m, one block"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.fill(v.x, v.value),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n, vec = c.sizes["n"], 16 // c.x.dtype.size
        vec = vec if n % vec == 0 else 1
        grid, defines = min(-(-n // (THREADS * vec)), 8 * gpu.sms), {"VEC": vec, "THREADS": THREADS}
        return Launches((Kernel("fill_kernel", "x | n value accumulate.x", grid, THREADS, 0, defines),))


fill = Fill()
