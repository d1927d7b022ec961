"""muon: one step of Muon over matrices, and the momentum that goes before it. See README.md."""

from typing import Any

from handgrad.core.dtypes import F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, case
from handgrad.core.plan import aligned
from handgrad.launch import Gemm, Gpu, Kernel, Launches
from handgrad.ops.adamw.reference import join_weight, round_weight, split_weight
from handgrad.ops.muon import reference
from handgrad.ops.muon.reference import POLYNOMIALS, Polynomial

THREADS, COLUMNS = 256, 32  # of a CUDA block; columns that a block of 32 x COLUMNS threads sums
STEPS = len(POLYNOMIALS[0])
PLAIN: dict[str, Any] = dict(
    polynomial=Polynomial.POLAR_EXPRESS, row_scale=False, rescale=False, cautious=False, beta2=0.0
)
PLAIN |= dict(first=0, start=128, scale=5e3, weight_decay=0.1)  # attributes of cases; p moves by as much as it is
EVERY = PLAIN | dict(row_scale=True, rescale=True, cautious=True, beta2=0.9)


class MuonMomentum(Op):
    """m moves towards the gradient; u is the gradient, moved towards m (Nesterov).

    Reads momentum and grad_scale from the step scalars. If it is 0, m keeps its bits and u is 0.
    """

    name = "muon_momentum"
    ins = "grad:n:grad"
    outs = "+m:n:f32 u:n:f32"
    cpu = CpuKernel("muon_momentum", "m u grad scalars | n")
    cases = (
        case(n=36),
        case(n=4096),
        case(n=589_824, real="gpt2-124m, attention's output"),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["n"] % 4:
            raise HandgradError("muon", "a slice has a multiple of 4 elements", d["n"])

    def ref(self, v: Any) -> tuple:
        if v.scalars.grad_scale == 0:
            return v.m, 0 * v.m
        return reference.muon_momentum(v.m, v.grad, float(v.scalars.momentum), float(v.scalars.grad_scale))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        n = c.sizes["n"]
        grid = min(-(-n // (4 * THREADS)), 8 * gpu.sms)
        args, defines = "m u grad scalars | n", {"THREADS": THREADS}
        return Launches((Kernel("muon_momentum_kernel", args, grid, THREADS, 0, defines, "momentum.cu"),))


class Muon(Op):
    """Orthogonalises each matrix of u, and moves p against it.

    u is a stack of matrices of `rows` rows; p are its elements from `first` on, or absent: then only v is updated.
    `start` is the place of p in the flat vectors; both are multiples of 4, like the elements of a matrix.

    polynomial  the steps that orthogonalise;  row_scale  rows get the same norm before them
    rescale     the result gets the norm of an orthogonal matrix
    beta2       of v, the mean square of each row (column, if they are longer), which evens them out; 0: no v
    scale       of the step, besides the learning rate;  cautious  only weights that the step shrinks decay

    Reads lr, step, seed and grad_scale from the step scalars. Changes nothing if grad_scale is 0.
    """

    name = "muon"
    ins = "u:R,N:f32"
    outs = "+p:k? +low:k:i16? +v:s:f32?"
    attrs = {
        "rows": int,
        "first": int,
        "count": int,
        "start": int,
        "polynomial": Polynomial,
        "row_scale": bool,
        "rescale": bool,
        "beta2": float,
        "scale": float,
        "weight_decay": float,
        "cautious": bool,
    }
    cpu = CpuKernel(
        "muon",
        "p low v u scalars scratch | R N rows first count start polynomial row_scale rescale beta2 scale weight_decay"
        " cautious threads",
        "muon_scratch N rows threads",
    )
    cases = (
        case(R=24, N=18, rows=8, k=432, count=432, without="v", **PLAIN),
        case(R=40, N=12, rows=40, k=480, count=480, s=40, **EVERY),
        case(R=48, N=36, rows=24, k=512, count=512, s=72, **EVERY | dict(first=700)),
        case(R=8, N=8, rows=8, k=64, count=64, without="v low", **PLAIN | dict(polynomial=Polynomial.NEWTON_SCHULZ)),
        case(R=8, N=36, rows=8, k=288, count=0, s=36, without="p low", **EVERY),
        case(
            R=768, N=768, rows=768, k=589_824, count=589_824, without="v", real="gpt2-124m, attention's output", **PLAIN
        ),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["R"] % d["rows"]:
            raise HandgradError("muon", f"u is a stack of matrices of {d['rows']} rows", d["R"])
        if d["rows"] * d["N"] % 4:
            raise HandgradError("muon", "a matrix has a multiple of 4 elements", f"{d['rows']} x {d['N']}")
        for name in ("first", "count", "start"):
            if d[name] % 4:
                raise HandgradError("muon", f"{name} is a multiple of 4 elements", d[name])

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        if out == "v":
            return attrs["beta2"] > 0
        return out != "low" or dtype is not F32  # an f32 p is the whole weight

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        if k.grad_scale == 0:
            return v.p, v.low, v.v
        o = reference.orthogonalise(v.u.reshape(-1, v.rows, v.N), v.polynomial, v.row_scale, v.round)
        o, second = reference.even_out(o, None if v.v is None else v.v.reshape(len(o), -1), v.rescale, v.beta2)
        if v.p is None:
            return None, None, second
        weight = v.p if v.low is None else join_weight(v.p, v.low)
        mine = o.reshape(-1)[v.first : v.first + v.count]
        weight = reference.apply(weight, mine, float(k.lr), v.scale, v.weight_decay, v.cautious)
        if v.low is not None:
            return *split_weight(weight), second
        return round_weight(weight, v.round(weight), v.start, int(k.seed), int(k.step)), None, second

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        R, N, rows = (c.sizes[d] for d in ("R", "N", "rows"))
        matrices, tall, size = R // rows, rows > N, c.dtype.size
        least = min(rows, N)
        square, lines = matrices * least * least * size, 4 * matrices * max(rows, N)
        parts = {
            "x0": R * N * size,
            "x1": R * N * size,
            "gram": square,
            "poly": square,
            "sums": lines,
            "factors": lines,
        }
        at, end = {}, 0
        for name, nbytes in parts.items():
            at[name], end = f"scratch@{end}", end + aligned(nbytes)
        defines = {"THREADS": THREADS, "COLUMNS": COLUMNS, "ROW_VEC": 1 if N % 4 else 4}
        defines |= {"VEC": 4, "LOW": int(c.low is not None)}

        def kernel(entry: str, args: str, grid: int | tuple[int, int, int], block: int = THREADS) -> Kernel:
            return Kernel(entry, args, grid, block, 0, defines)

        steps: list[Kernel | Gemm] = [
            kernel("muon_row_squares_kernel", f"{at['sums']} u | N", R),
            kernel("muon_scale_kernel", f"{at['factors']} {at['sums']} | rows polynomial row_scale", matrices),
            kernel("muon_prepare_kernel", f"{at['x0']} u {at['factors']} | R N", min(R, 16 * gpu.sms)),
        ]
        x, to = at["x0"], at["x1"]
        gram, poly, elements = at["gram"], at["poly"], matrices * least * least
        for i in range(STEPS):
            steps += [
                Gemm(gram, x, x, least, least, max(rows, N), ta=tall, tb=not tall, batch=matrices),
                Gemm(poly, gram, gram, least, least, least, batch=matrices),
                kernel(
                    "muon_polynomial_kernel",
                    f"{poly} {gram} | {elements} {least} polynomial {i}",
                    min(-(-elements // THREADS), 8 * gpu.sms),
                ),
                Gemm(to, x, poly, rows, N, N, batch=matrices)
                if tall
                else Gemm(to, poly, x, rows, N, rows, batch=matrices),
            ]
            x, to = to, x
        if c.attrs["rescale"] or c.v is not None:
            steps += self._even_out(c, x, at, kernel)
        if c.p is not None:
            factors = at["factors"] if c.attrs["rescale"] or c.v is not None else "null"
            grid = min(-(-c.attrs["count"] // (4 * THREADS)), 8 * gpu.sms)
            args = f"p low {x} {factors} scalars | N rows first count start cautious scale weight_decay"
            steps.append(kernel("muon_apply_kernel", args, grid))
        return Launches(tuple(steps), end)

    def _even_out(self, c: Call, x: str, at: dict[str, str], kernel: Any) -> list[Kernel]:
        """The launches that find a factor for each row of x, or for each column if it is wide, and the next v."""
        R, N, rows = (c.sizes[d] for d in ("R", "N", "rows"))
        if rows >= N:
            squares = kernel("muon_x_row_squares_kernel", f"{at['sums']} {x} | N", R)
        else:
            grid = (-(-N // 32), R // rows, 1)
            squares = kernel("muon_column_squares_kernel", f"{at['sums']} {x} | rows N", grid, 32 * COLUMNS)
        args = f"{at['factors']} v {at['sums']} scalars | rows N rescale beta2"
        return [squares, kernel("muon_even_kernel", args, R // rows)]

    def flops(self, c: Call) -> int:
        rows, N = c.sizes["rows"], c.sizes["N"]
        least, most = min(rows, N), max(rows, N)
        return c.sizes["R"] // rows * STEPS * 2 * (2 * least * least * most + least**3)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name == "low":
            return rng.integers(-(1 << 15), 1 << 15, shape, dtype="int16")
        if arg.name == "u":
            u = rng.standard_normal(shape)
            u[0] = (
                0.0  # a hard row; equal ones would make every result a rounding error that is enlarged a thousandfold
            )
            return u
        return rng.random(shape) / v["N"] if arg.name == "v" else None  # a mean of squares


muon_momentum, muon = MuonMomentum(), Muon()
