"""loss_sum: the sum of a step's losses, for the log. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.core.scalars import STEP_SCALARS_BYTES
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.loss_sum import reference

THREADS = 1024  # of the only CUDA block


class LossSum(Op):
    """scalars.loss_sum = sum(losses); += if an earlier call of the step has written it."""

    name = "loss_sum"
    ins = "losses:N:f32"
    outs = f"+scalars:{STEP_SCALARS_BYTES}:byte"
    cpu = CpuKernel("loss_sum", "scalars losses | N accumulate.scalars")
    cases = (case(N=33), case(N=1), case(N=5000), case(N=65_536, real="gpt2-124m, B=64 T=1024"))

    def ref(self, v: Any) -> tuple:
        v.scalars.loss_sum = reference.loss_sum(v.losses) + v.accumulates("scalars") * v.scalars.loss_sum
        return (None,)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        args = "scalars losses | N accumulate.scalars"
        return Launches((Kernel("loss_sum_kernel", args, 1, THREADS, defines={"THREADS": THREADS}),))


loss_sum = LossSum()
