"""add: the sum of two activations, or of two gradients of one activation. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.add import reference

THREADS = 256  # of a CUDA block


class Add(Op):
    """y = a + b."""

    name = "add"
    ins = "a:N,C b:N,C"
    outs = "y:N,C"
    cpu = CpuKernel("add", "y a b | N C")
    cases = (case(N=7, C=33), case(N=1, C=1), case(N=50, C=200), case(N=1024, C=768, real="gpt2-124m, B=4 T=256"))

    def ref(self, v: Any) -> tuple:
        return (reference.add(v.a, v.b),)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        dy = d["y"]
        return {} if dy is None else {"a": dy, "b": dy}  # the inputs share one gradient buffer

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n, vec = c.sizes["N"] * c.sizes["C"], 16 // c.dtype.size
        defines = {"VEC": vec if n % vec == 0 else 1, "MANY": 4, "THREADS": THREADS}
        grid = -(-n // (THREADS * defines["VEC"] * defines["MANY"]))
        return Launches((Kernel("add_kernel", "y a b | N C", grid, THREADS, 0, defines),))


add = Add()
