"""ema: an exponential moving average of the weights. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.adamw.reference import join_weight
from handgrad.ops.ema import reference

THREADS = 256  # of a CUDA block


class Ema(Op):
    """average += (1 - keep) (weight - average), keep = min(decay, (1 + step) / (10 + step)).

    The weight is p or, with low, the float32 weight whose bits are those of p plus low.

    Reads step and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "ema"
    ins = "p:n low:n:i16?"
    outs = "+average:n:f32"
    attrs = {"decay": float}
    cpu = CpuKernel("ema", "average p low scalars | n decay")
    cases = (
        case(n=33, decay=0.999),
        case(n=1, decay=0.1, without="low"),
        case(n=4099, decay=0.1, without="low"),
        case(n=640, decay=0.1),
        case(n=7_087_872, decay=0.999, real="gpt2-124m, one block"),
    )

    def ref(self, v: Any) -> tuple:
        if v.scalars.grad_scale == 0:
            return (v.average,)
        weight = v.p if v.low is None else join_weight(v.p, v.low)
        return (reference.ema(v.average, weight, v.decay, int(v.scalars.step)),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n = c.sizes["n"]
        vec = 4 if n % 4 == 0 else 1
        defines = {"VEC": vec, "LOW": int(c.low is not None), "THREADS": THREADS, "DECAY": c.attrs["decay"]}
        grid = min(-(-n // (THREADS * vec)), 8 * gpu.sms)
        return Launches((Kernel("ema_kernel", "average p low scalars | n", grid, THREADS, 0, defines),))

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return rng.integers(-(1 << 15), 1 << 15, shape, dtype="int16") if arg.name == "low" else None


ema = Ema()
