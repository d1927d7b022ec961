"""pick: rows of an activation by their indices. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.pick import reference

THREADS = 256  # of a CUDA block


class Pick(Op):
    """y[m] = x[rows[m]], and 0 where rows[m] is negative. Every rows[m] is below N."""

    name = "pick"
    ins = "x:N,C rows:M:i32"
    outs = "y:M,C"
    saved = "rows"
    cpu = CpuKernel("pick_forward", "y x rows | M C")
    cases = (
        case(N=7, C=33, M=9),
        case(N=1, C=1, M=1),
        case(N=70, C=64, M=20),
        case(N=5, C=1032, M=300),
        case(N=4096, C=768, M=640, real="bert-base, B=32 T=128, 20 masked"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.pick_forward(v.x, v.rows),)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _rows(rng, shape, v) if arg.name == "rows" else None

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        defines = _layout(c)
        grid = -(-c.y.size // (THREADS * defines["VEC"]))
        return Launches((Kernel("pick_forward_kernel", "y x rows | M", grid, THREADS, 0, defines),))

    def nbytes(self, c: Call) -> int:
        """Counts the rows that are picked, not all of x."""
        return c.rows.nbytes + 2 * c.y.nbytes

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"x": g.emit(pick_backward, d["y"], c.rows, N=c.sizes["N"])}


class PickBackward(Op):
    """dx[n] = the sum of dy[m] over all m with rows[m] = n, in the order of m; 0 if there is none."""

    name = "pick_backward"
    ins = "dy:M,C rows:M:i32"
    outs = "dx:N,C"
    attrs = {"N": int}
    cpu = CpuKernel("pick_backward", "dx dy rows scratch | N M C", "pick_backward_scratch N M")
    cases = Pick.cases

    sample = Pick.sample

    def ref(self, v: Any) -> tuple:
        return (reference.pick_backward(v.dy, v.rows, v.N),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, M = c.sizes["N"], c.sizes["M"]
        d = _layout(c)
        steps = (
            Kernel("pick_clear_kernel", "scratch | N", -(-N // THREADS), THREADS, 0, d),
            Kernel("pick_bounds_kernel", "scratch rows | N M", -(-M // THREADS), THREADS, 0, d),
            Kernel("pick_sum_kernel", "dx dy rows scratch | N", -(-c.dx.size // (THREADS * d["VEC"])), THREADS, 0, d),
        )
        return Launches(steps, scratch=8 * N)


def _layout(c: Call) -> dict[str, int]:
    vec = 16 // c.dtype.size
    return {"THREADS": THREADS, "COLUMNS": c.sizes["C"], "VEC": vec if c.sizes["C"] % vec == 0 else 1}


def _rows(rng: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
    """Random rows, some of them several times, every fifth one padding."""
    rows = rng.integers(0, v["N"], shape, dtype="int32")
    rows[4::5] = -1
    return rows


pick, pick_backward = Pick(), PickBackward()
