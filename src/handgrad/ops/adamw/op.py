"""adamw, adamw_bf16, adamw_int8: one step of AdamW over a slice of the flat parameters, with moments of four bytes, of
two, or of one and a scale per block. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Launches
from handgrad.ops import updates
from handgrad.ops.adamw import reference

BLOCK = 128  # elements that share a scale; a parameter starts at a multiple of it
BETAS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}  # of cases


def updated(v: Any, m: Any, s: Any, factor: float = 1.0) -> tuple:
    """The weights and the moments after the step of a call with the arguments `v`, before they are rounded."""
    k = v.scalars
    age = int(k.step - k.state_since)
    hyper = (v.beta1, v.beta2, v.eps, v.weight_decay, float(k.lr), age, float(k.grad_scale), factor)
    return reference.adamw(reference.whole_weight(v), m, s, v.grad, *hyper)


class AdamW(Op):
    """Updates p, m, v, and low: the 16 bits of the float32 weight that a bf16 p lacks. Without low, p rounds
    stochastically.

    `factor`, if it is given, multiplies the step, but not the decay (the size of the weights, op rms).
    `start` is the first element of the slice in the flat vectors, a multiple of 4.

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "adamw"
    ins = "grad:n:grad factor:1:f32?"
    outs = "+p:n +m:n:f32 +v:n:f32 +low:n:i16?"
    attrs = {"start": int, "beta1": float, "beta2": float, "eps": float, "weight_decay": float}
    cpu = CpuKernel("adamw", "p m v low grad factor scalars | n start beta1 beta2 eps weight_decay")
    cases = (
        case(n=33, start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, without="factor"),
        case(n=1, start=0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, without="factor"),
        case(n=4099, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, without="factor"),
        case(n=4099, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, low=False, without="factor"),
        case(n=640, start=256, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
        case(n=640, start=256, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, low=False, without="factor"),
        case(
            n=7_087_872,
            start=0,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            real="gpt2-124m, one block",
            without="factor",
        ),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start("adamw", d)

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        if v.scalars.grad_scale == 0:
            return v.p, v.m, v.v, v.low
        weight, m, s = updated(v, v.m, v.v, 1.0 if v.factor is None else float(v.factor[0]))
        p, low = reference.halves(v, weight)
        return p, m, s, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        args = "p m v low grad factor scalars | n start eps weight_decay"
        return updates.launch(c, gpu, args, defines, held=5 if c.sizes["n"] % 4 == 0 else 4)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


class AdamWBf16(Op):
    """`adamw` with m and v in bf16, rounded stochastically.

    `start` is the first element of the slice in the flat vectors, a multiple of 4.
    """

    name = "adamw_bf16"
    ins = "grad:n:grad"
    outs = "+p:n +m:n:bf16 +v:n:bf16 +low:n:i16?"
    attrs = {"start": int, "beta1": float, "beta2": float, "eps": float, "weight_decay": float}
    cpu = CpuKernel("adamw_bf16", "p m v low grad scalars | n start beta1 beta2 eps weight_decay")
    cases = (
        case(n=33, start=0, weight_decay=0.1, **BETAS),
        case(n=1031, start=128, weight_decay=0.0, low=False, **BETAS),
        case(n=640, start=256, weight_decay=0.1, **BETAS),
        case(n=7_087_872, start=0, weight_decay=0.1, **BETAS, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start(self.name, d)

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.m, v.v, v.low
        weight, m, s = updated(v, v.m, v.v)
        bits = reference.moment_bits(m.size, v.start, int(k.seed), int(k.step))
        p, low = reference.halves(v, weight)
        return p, reference.round_moment(m, bits[0]), reference.round_moment(s, bits[1]), low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        args = "p m v low grad scalars | n start eps weight_decay"
        return updates.launch(c, gpu, args, defines, file="lowbit.cu")

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


class AdamWInt8(Op):
    """`adamw` with codes of m and v and, for b blocks of 128 elements, their scales.

    `start` is the first element of the slice in the flat vectors; it and n are multiples of 128.
    """

    name = "adamw_int8"
    ins = "grad:n:grad"
    outs = "+p:n +m:n:byte +v:n:byte +m_scale:b:f32 +v_scale:b:f32 +low:n:i16?"
    attrs = AdamWBf16.attrs
    cpu = CpuKernel("adamw_int8", "p m v m_scale v_scale low grad scalars | n start beta1 beta2 eps weight_decay")
    cases = (
        case(n=128, b=1, start=0, weight_decay=0.1, **BETAS),
        case(n=1280, b=10, start=128, weight_decay=0.0, low=False, **BETAS),
        case(n=640, b=5, start=256, weight_decay=0.1, **BETAS),
        case(n=7_087_872, b=55_374, start=0, weight_decay=0.1, **BETAS, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start(self.name, d, BLOCK)
        if d["n"] % BLOCK:
            raise HandgradError(self.name, f"a slice is whole blocks of {BLOCK} elements", d["n"])

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.m, v.v, v.m_scale, v.v_scale, v.low
        first, second = reference.decode_first(v.m, v.m_scale), reference.decode_second(v.v, v.v_scale)
        weight, m, s = updated(v, first, second)
        bits = reference.moment_bits(m.size, v.start, int(k.seed), int(k.step))
        (m, m_scale), (s, v_scale) = reference.encode_first(m, bits[0]), reference.encode_second(s, bits[1])
        p, low = reference.halves(v, weight)
        return p, m, s, m_scale, v_scale, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        args = "p m v m_scale v_scale low grad scalars | n start eps weight_decay"
        return updates.launch(c, gpu, args, defines, file="lowbit.cu")

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name in ("m", "v"):
            return rng.integers(0, 256, shape, dtype="uint8")
        return rng.random(shape) if arg.name in ("m_scale", "v_scale") else updates.sample(rng, arg, shape)


adamw, adamw_bf16, adamw_int8 = AdamW(), AdamWBf16(), AdamWInt8()
