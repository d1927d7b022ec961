"""cap_logits: scaled and capped logits, for generation. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.cap_logits import reference

THREADS = 256  # of a CUDA block


class CapLogits(Op):
    """y = softcap * tanh(scale * z / softcap); softcap 0: y = scale * z. lm_loss does the same to its own logits."""

    name = "cap_logits"
    ins = "z:N,V"
    outs = "y:N,V"
    attrs = {"scale": float, "softcap": float}
    cpu = CpuKernel("cap_logits", "y z | N V scale softcap")
    cases = (
        case(N=7, V=33, scale=0.5, softcap=3.0),
        case(N=1, V=1, scale=2.0, softcap=0.0),
        case(N=50, V=200, scale=0.125, softcap=0.0),
        case(N=5, V=2072, scale=1.0, softcap=0.5),
        case(N=4, V=256000, scale=1.0, softcap=30.0, real="gemma 2, decoding B=4"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.cap_logits(v.z, v.scale, v.softcap),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n, vec = c.z.size, 16 // c.dtype.size
        defines = {"VEC": vec if n % vec == 0 else 1, "THREADS": THREADS, "CAPPED": int(c.attrs["softcap"] != 0)}
        grid = -(-n // (THREADS * defines["VEC"]))
        return Launches((Kernel("cap_logits_kernel", "y z | N V scale softcap", grid, THREADS, 0, defines),))


cap_logits = CapLogits()
