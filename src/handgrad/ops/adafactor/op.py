"""adafactor: one step of Adafactor for one parameter. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops import updates
from handgrad.ops.adafactor import reference
from handgrad.ops.adamw.reference import halves, whole_weight

SUM_THREADS = 1024  # of the CUDA block that adds all rows
T5: dict[str, Any] = {"decay": 0.8, "eps": 1e-30, "clip": 1.0}  # of cases


class Adafactor(Op):
    """Updates p, a matrix of M rows and K columns, the means `row` and `col` of its squared gradients, and low as adamw
    does. A vector is a matrix of one row: `col` is then its whole second moment.

    factor         multiplies the step, but not the decay (the size of the weights, op rms)
    start          the first element of the slice in the flat vectors, a multiple of 4
    count          of the n elements, how many are no padding
    relative_step  the step's learning rate is at most 1 / sqrt(step)

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "adafactor"
    ins = "grad:n:grad factor:1:f32?"
    outs = "+p:n +row:M:f32 +col:K:f32 +low:n:i16?"
    attrs = {
        "start": int,
        "M": int,
        "K": int,
        "count": int,
        "relative_step": bool,
        "decay": float,
        "eps": float,
        "clip": float,
        "weight_decay": float,
    }
    cpu = CpuKernel(
        "adafactor",
        "p row col low grad factor scalars scratch | n start M K count relative_step decay eps clip weight_decay",
        "adafactor_scratch M K",
    )
    cases = (
        case(n=999, M=27, K=37, count=962, start=128, relative_step=False, weight_decay=0.1, **T5),
        case(n=33, M=1, K=33, count=33, start=0, relative_step=True, weight_decay=0.0, **T5, without="factor"),
        case(n=2560, M=40, K=64, count=2560, start=0, relative_step=True, weight_decay=0.0, low=False, **T5),
        case(
            n=1_769_472,
            M=2304,
            K=768,
            count=1_769_472,
            start=0,
            relative_step=False,
            weight_decay=0.0,
            real="gpt2-124m, q, k and v of a block",
            **T5,
        ),
    )

    def derive(self, d: dict[str, int]) -> None:
        updates.check_start("adafactor", d)
        if d["M"] * d["K"] != d["n"]:
            raise HandgradError("adafactor", f"a slice of {d['n']} elements is M x K", f"{d['M']} x {d['K']}")

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return updates.keeps_low(attrs, dtype)

    def ref(self, v: Any) -> tuple:
        k, lr = v.scalars, float(v.scalars.lr)
        age = int(k.step - k.state_since)
        if k.grad_scale == 0:
            return v.p, v.row, v.col, v.low
        weight, row, col = reference.adafactor(
            whole_weight(v),
            v.row,
            v.col,
            v.grad,
            1.0 if v.factor is None else float(v.factor[0]),
            v.count,
            v.decay,
            v.eps,
            v.clip,
            v.weight_decay,
            lr,
            min(lr, age**-0.5) if v.relative_step else lr,
            age,
            float(k.grad_scale),
        )
        p, low = halves(v, weight)
        return p, row, col, low

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n, M, K, threads = c.sizes["n"], c.sizes["M"], c.sizes["K"], updates.THREADS
        blocks = min(-(-n // (4 * threads)), 4 * gpu.sms)
        defines = updates.slice_defines(c) | {"ROWS": M, "COLUMNS": K, "BLOCKS": blocks, "THREADS": threads}
        defines |= {"SUM_THREADS": SUM_THREADS, "DECAY": c.attrs["decay"]}
        step = "p low scratch row col grad factor scalars | n start count clip weight_decay relative_step"
        return Launches(
            (
                Kernel("adafactor_rows_kernel", "row grad scalars | eps", M, threads, 0, defines),
                Kernel("adafactor_columns_kernel", "col grad scalars | eps", -(-K // 32), 1024, 0, defines),
                Kernel("adafactor_mean_kernel", "scratch row |", 1, SUM_THREADS, 0, defines),
                Kernel("adafactor_sum_kernel", "scratch row col grad scalars | n", blocks, threads, 0, defines),
                Kernel("adafactor_kernel", step, blocks, threads, 0, defines),
            ),
            scratch=8 * (1 + blocks),
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


adafactor = Adafactor()
