"""dropout: zeroes a random fraction p of the elements and scales the rest up. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.dropout import reference

THREADS = 256  # of a CUDA block


class Dropout(Op):
    """y = x / (1 - p) where kept, else 0. The mask depends on step scalars, `stream` and the element's index alone."""

    name = "dropout"
    ins = "x:N,C"
    outs = "y:N,C"
    attrs = {"p": float, "stream": int}
    cpu = CpuKernel("dropout_forward", "y x scalars | N C p stream")
    cases = (
        case(N=7, C=33, p=0.1, stream=1),
        case(N=1, C=1, p=0.5, stream=2),
        case(N=64, C=128, p=0.0, stream=3),
        case(N=1024, C=768, p=0.1, stream=4, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.dropout_forward(v.x, v.p, v.stream, v.scalars.seed, v.scalars.step, v.scalars.micro_step),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n, vec = c.sizes["N"] * c.sizes["C"], 16 // c.dtype.size
        vec = vec if n % vec == 0 else 1
        width = max(vec, 4)  # elements of a thread at a time; one call of the generator gives four
        grid = min(-(-n // (THREADS * width)), 8 * gpu.sms)
        defines, args = {"VEC": vec, "WIDTH": width, "THREADS": THREADS}, "y x scalars | N C p stream"
        return Launches((Kernel("dropout_forward_kernel", args, grid, THREADS, 0, defines),))

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"x": g.emit(dropout, d["y"], **c.attrs)}  # linear and diagonal: the same op, with the same mask


dropout = Dropout()
