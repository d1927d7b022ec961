"""schedule_free, schedule_free_count, schedule_free_average: schedule-free AdamW over a slice of the flat parameters,
the share of a step in the average of the iterates, and that average in place of the weights. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops import updates
from handgrad.ops.adamw.reference import halves, whole_weight
from handgrad.ops.schedule_free import reference

COUNT = (7.25, 5e-4)  # of cases: 7.25 steps at this rate


class ScheduleFreeCount(Op):
    """count[0], 1 / the share of this step in the average; count[1], the largest learning rate so far.

    Reads lr and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "schedule_free_count"
    outs = "+count:2:f32"
    cpu = CpuKernel("schedule_free_count", "count scalars |")
    cases = (case(),)

    def ref(self, v: Any) -> tuple:
        if v.scalars.grad_scale == 0:
            return (v.count,)
        return (reference.count_step(v.count, float(v.scalars.lr)),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches((Kernel("schedule_free_count_kernel", "count scalars |", 1, 1, file="count.cu"),))

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return COUNT


class ScheduleFree(Op):
    """Updates p, the point y at which gradients are taken; z, the iterate; v; and low as adamw does.

    `start` is the first element of the slice in the flat vectors, a multiple of 4.

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "schedule_free"
    ins = "grad:n:grad count:2:f32"
    outs = "+p:n +z:n:f32 +v:n:f32 +low:n:i16?"
    attrs = {"start": int, "beta1": float, "beta2": float, "eps": float, "weight_decay": float}
    cpu = CpuKernel("schedule_free", "p z v low grad count scalars | n start beta1 beta2 eps weight_decay")
    cases = (
        case(n=33, start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
        case(n=1, start=0, beta1=0.5, beta2=0.999, eps=1e-8, weight_decay=0.0),
        case(n=1031, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, low=False),
        case(n=640, start=256, beta1=0.98, beta2=0.99, eps=1e-8, weight_decay=0.1),
        case(n=7_087_872, start=0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, real="gpt2-124m, one block"),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start("schedule_free", d)

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.z, v.v, v.low
        hyper = (v.beta1, v.beta2, v.eps, v.weight_decay, float(k.lr), int(k.step - k.state_since), float(k.grad_scale))
        weight, z, s = reference.schedule_free(whole_weight(v), v.z, v.v, v.grad, v.count, *hyper)
        p, low = halves(v, weight)
        return p, z, s, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {"BETA1": c.attrs["beta1"], "BETA2": c.attrs["beta2"]}  # as doubles; kernel arguments are floats
        return updates.launch(c, gpu, "p z v low grad count scalars | n start eps weight_decay", defines)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return COUNT if arg.name == "count" else updates.sample(rng, arg, shape)


class ScheduleFreeAverage(Op):
    """p, which holds y, becomes x = y + (1 - 1 / beta1) (z - y), rounded to nearest. y includes low, which stays."""

    name = "schedule_free_average"
    ins = "z:n:f32 low:n:i16?"
    outs = "+p:n"
    attrs = {"beta1": float}
    cpu = CpuKernel("schedule_free_average", "p z low | n beta1")
    cases = (
        case(n=33, beta1=0.9),
        case(n=1, beta1=0.5, without="low"),
        case(n=1031, beta1=0.98, without="low"),
        case(n=640, beta1=0.9, without="low"),
        case(n=7_087_872, beta1=0.9, real="gpt2-124m, one block", without="low"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.average(whole_weight(v), v.z, v.beta1),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = {**updates.slice_defines(c), "THREADS": updates.THREADS, "BETA1": c.attrs["beta1"]}
        grid = min(-(-c.sizes["n"] // (4 * updates.THREADS)), 4 * gpu.sms)
        kernel = Kernel("schedule_free_average_kernel", "p z low | n", grid, updates.THREADS, 0, defines, "average.cu")
        return Launches((kernel,))

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return 0 * updates.sample(rng, arg, shape) if arg.name == "low" else None  # the op's test has others


schedule_free, schedule_free_count, schedule_free_average = ScheduleFree(), ScheduleFreeCount(), ScheduleFreeAverage()
