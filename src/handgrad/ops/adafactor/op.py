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
T5: dict[str, Any] = {"first": 0, "decay": 0.8, "eps": 1e-30, "clip": 1.0}  # of cases
SHARE = T5 | {"first": 128}


class Adafactor(Op):
    """Updates the means `row` and `col` of the squared gradients of a matrix of M rows and K columns; p, the k elements
    of the matrix from `first` on, all or those of a rank's share, maybe none; and low as adamw does. A vector is a
    matrix of one row: `col` is then its whole second moment.

    factor         multiplies the step, but not the decay (the size of the weights, op rms)
    first, start   the first element of p in the matrix, and in the flat vectors; multiples of 4
    count          of the n elements of the matrix, how many are no padding
    relative_step  the step's learning rate is at most 1 / sqrt(step)

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "adafactor"
    ins = "grad:n:grad factor:1:f32?"
    outs = "+p:k +row:M:f32 +col:K:f32 +low:k:i16?"
    attrs = {
        "first": int,
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
        "p row col low grad factor scalars scratch | n k first start M K count relative_step decay eps clip"
        " weight_decay",
        "adafactor_scratch M K",
    )
    cases = (
        case(n=999, k=999, M=27, K=37, count=962, start=128, relative_step=False, weight_decay=0.1, **T5),
        case(n=33, k=33, M=1, K=33, count=33, start=0, relative_step=True, weight_decay=0.0, **T5, without="factor"),
        case(n=2560, k=2560, M=40, K=64, count=2560, start=0, relative_step=True, weight_decay=0.0, low=False, **T5),
        case(n=999, k=256, M=27, K=37, count=962, start=0, relative_step=False, weight_decay=0.1, **SHARE),
        case(n=2560, k=0, M=40, K=64, count=2560, start=0, relative_step=False, weight_decay=0.0, **T5),
        case(
            n=1_769_472,
            k=1_769_472,
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
            raise HandgradError("adafactor", f"a gradient of {d['n']} elements is M x K", f"{d['M']} x {d['K']}")
        if d["first"] % 4:
            raise HandgradError("adafactor", "first is a multiple of 4 elements", d["first"])

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
            v.first,
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
        n, k, M, K, threads = (*(c.sizes[d] for d in "nkMK"), updates.THREADS)
        blocks = min(-(-n // (4 * threads)), 4 * gpu.sms)
        defines = updates.slice_defines(c) | {"ROWS": M, "COLUMNS": K, "BLOCKS": blocks, "THREADS": threads}
        defines |= {"SUM_THREADS": SUM_THREADS, "DECAY": c.attrs["decay"], "VEC": 1 if n % 4 or k % 4 else 4}
        step = "p low scratch row col grad factor scalars | k first start count clip weight_decay relative_step"
        update = Kernel("adafactor_kernel", step, blocks, threads, 0, defines)
        return Launches(
            (
                Kernel("adafactor_rows_kernel", "row grad scalars | eps", M, threads, 0, defines),
                Kernel("adafactor_columns_kernel", "col grad scalars | eps", -(-K // 32), 1024, 0, defines),
                Kernel("adafactor_mean_kernel", "scratch row |", 1, SUM_THREADS, 0, defines),
                Kernel("adafactor_sum_kernel", "scratch row col grad scalars | n", blocks, threads, 0, defines),
                *([update] if k else []),
            ),
            scratch=8 * (1 + blocks),
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return updates.sample(rng, arg, shape)


adafactor = Adafactor()
