"""adamw: one step of AdamW over a slice of the flat parameters. See README.md."""

from typing import Any

from handgrad.core.dtypes import F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.adamw import reference

THREADS = 256  # of a block


class AdamW(Op):
    """Updates p, m, v, and low: the 16 bits of the float32 weight that a bf16 p lacks. Without low, p rounds
    stochastically.

    `start` is the first element of the slice in the flat vectors, a multiple of 4.

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "adamw"
    ins = "grad:n:grad"
    outs = "+p:n +m:n:f32 +v:n:f32 +low:n:i16?"
    attrs = {"start": int, "beta1": float, "beta2": float, "eps": float, "weight_decay": float}
    cpu = CpuKernel("adamw", "p m v low grad scalars | n start beta1 beta2 eps weight_decay")
    cases = (
        case(n=33, start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
        case(n=1, start=0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0),
        case(n=4099, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
        case(n=4099, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, low=False),
        case(n=640, start=256, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
        case(n=640, start=256, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, low=False),
        case(n=7_087_872, start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["start"] % 4:
            raise HandgradError("adamw", "a slice starts at a multiple of 4 elements", d["start"])

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return dtype is not F32 and attrs.get("low", True)  # an f32 p is the whole weight

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.m, v.v, v.low
        weight, m, s = reference.adamw(
            v.p if v.low is None else reference.join_weight(v.p, v.low),
            v.m,
            v.v,
            v.grad,
            v.beta1,
            v.beta2,
            v.eps,
            v.weight_decay,
            float(k.lr),
            int(k.step),
            float(k.grad_scale),
        )
        if v.low is not None:
            p, low = reference.split_weight(weight)
            return p, m, s, low
        return reference.round_weight(weight, v.round(weight), v.start, int(k.seed), int(k.step)), m, s, None

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        vec = 4 if c.sizes["n"] % 4 == 0 else 1
        held = 5 if vec == 4 else 4  # blocks per SM, limited by registers
        defines = {"VEC": vec, "LOW": int(c.low is not None), "THREADS": THREADS, "HELD": held}
        defines |= {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        grid = min(-(-c.sizes["n"] // (4 * THREADS)), gpu.sms * held)
        args = "p m v low grad scalars | n start eps weight_decay"
        return Launches((Kernel("adamw_kernel", args, grid, THREADS, 0, defines),))

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name == "low":
            return rng.integers(-(1 << 15), 1 << 15, shape, dtype="int16")
        return rng.random(shape) if arg.name == "v" else None  # a mean of squares


adamw = AdamW()
