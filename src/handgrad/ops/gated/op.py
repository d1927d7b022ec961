"""gated: y = act(gate) * up of packed columns (SwiGLU, GeGLU), and its gradient call. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.act import Act
from handgrad.ops.gated import reference

THREADS = 256  # of a CUDA block
PACKS, BACKWARD_PACKS = 2, 1  # accesses per thread to each array in the forward and in the backward


class Gated(Op):
    """y = act(gate) * up; the first M columns of x are gate, the last M are up."""

    name = "gated"
    ins = "x:N,G"
    outs = "y:N,M"
    attrs = {"act": Act}
    saved = "x"
    cpu = CpuKernel("gated", "y x | N M act")
    cases = (
        case(N=7, G=66, act=Act.SILU),
        case(N=1, G=2, act=Act.SILU),
        case(N=130, G=592, act=Act.SILU),
        *(case(N=9, G=80, act=act) for act in Act if act is not Act.SILU),
        case(N=3, G=8208, act=Act.SILU),
        case(N=1024, G=16384, act=Act.SILU, real="llama-3.2-1b, B=1 T=1024"),
    )

    def derive(self, d: dict[str, int]) -> None:
        _halve(self.name, d)

    def ref(self, v: Any) -> tuple:
        return (reference.gated(v.x, v.act),)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"x": g.emit(gated_backward, d["y"], c.x, act=c.attrs["act"])}

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "act"}

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches((_kernel("gated_kernel", "y x | N", c, PACKS),))


class GatedBackward(Op):
    """The gradient of x: that of gate is dy * up * act'(gate), that of up is dy * act(gate)."""

    name = "gated_backward"
    ins = "dy:N,M x:N,G"
    outs = "dx:N,G"
    attrs = {"act": Act}
    cpu = CpuKernel("gated_backward", "dx dy x | N M act")
    cases = Gated.cases

    def derive(self, d: dict[str, int]) -> None:
        _halve(self.name, d)

    def ref(self, v: Any) -> tuple:
        return (reference.gated_backward(v.dy, v.x, v.act),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches((_kernel("gated_backward_kernel", "dx dy x | N", c, BACKWARD_PACKS),))


def _halve(name: str, d: dict[str, int]) -> None:
    """Sets M, or checks it: half of x's columns."""
    if d["G"] % 2:
        raise HandgradError(name, "x has an even number of columns, a gate and a value for each of y", d["G"])
    if d.setdefault("M", d["G"] // 2) != d["G"] // 2:
        raise HandgradError(name, f"dy has half of x's {d['G']} columns", d["M"])


def _kernel(entry: str, args: str, c: Call, packs: int) -> Kernel:
    """A launch over all elements of y, `packs` accesses of a thread to each array."""
    N, M, most = c.sizes["N"], c.sizes["M"], 16 // c.dtype.size
    vec = most if M % most == 0 else 1
    defines = {"COLUMNS": M, "VEC": vec, "PACKS": packs, "THREADS": THREADS, "ACT": c.attrs["act"].value}
    return Kernel(entry, args, -(-N * M // (THREADS * packs * vec)), THREADS, 0, defines)


gated, gated_backward = Gated(), GatedBackward()
