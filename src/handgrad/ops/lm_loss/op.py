"""lm_loss: the head and its cross entropy, one chunk of rows at a time: full logits never exist. See README.md."""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import IGNORE_INDEX, Tensor
from handgrad.launch import Gemm, Gpu, Kernel, Launches
from handgrad.ops import wgmma_gemm
from handgrad.ops.linear.op import bias_gradient
from handgrad.ops.lm_loss import reference

WARPS = 8  # of a block of exponentials.cu, one row each
PLAIN: dict[str, Any] = {"scale": 1.0, "softcap": 0.0, "without": "b weights db"}  # of a case: logits x w^T, no weights
MIN_C = wgmma_gemm.TILE_N // 32 * wgmma_gemm.TILE_K  # exp_gemm.cu writes 32 columns of a tile in each step of the next


class LmLoss(Op):
    """losses = weights * (logsumexp(z) - z[target]), nats per row, of the logits z: for evaluation.

    z = cap(scale * (x w^T + b)) with cap(z) = softcap * tanh(z / softcap); softcap 0: no cap. Without weights they are
    1. `logits` is the workspace of one chunk.
    """

    name = "lm_loss"
    ins = "x:N,C w:Vp,C targets:N:i32 b:Vp? weights:N:f32?"
    outs = "losses:N:f32 logits:rows,Vp"
    attrs = {"V": int, "chunks": int, "scale": float, "softcap": float}
    undefined = "logits"
    cpu = CpuKernel(
        "lm_loss_forward",
        "losses x w targets b weights logits scratch | N C V Vp ignore_index rows scale softcap threads",
        "lm_loss_scratch N C Vp rows threads",
    )
    cases = (
        case(N=7, C=33, Vp=19, V=17, chunks=2, **PLAIN),
        case(N=1, C=1, Vp=1, V=1, chunks=1, **PLAIN),
        case(N=67, C=64, Vp=128, V=97, chunks=3, **PLAIN),
        case(N=9, C=8, Vp=8832, V=8801, chunks=2, **PLAIN),
        case(N=70, C=512, Vp=520, V=513, chunks=2, **PLAIN),
        case(N=7, C=33, Vp=19, V=17, chunks=2, scale=0.5, softcap=3.0),
        case(N=1, C=1, Vp=1, V=1, chunks=1, scale=2.0, softcap=1.0),
        case(N=67, C=64, Vp=128, V=97, chunks=3, scale=1.0, softcap=0.0, without="weights"),
        case(N=67, C=64, Vp=128, V=97, chunks=3, scale=0.125, softcap=0.0, without="b weights db"),
        case(N=70, C=512, Vp=520, V=513, chunks=2, scale=1.0, softcap=0.0, without="b db"),
        case(N=9, C=8, Vp=8832, V=8801, chunks=2, scale=1.0, softcap=5.0, without="b weights db"),
        case(N=256, C=768, Vp=50304, V=50257, chunks=1, **PLAIN, real="gpt2-124m, B=4 T=64"),
        case(N=160, C=768, Vp=30592, V=30522, chunks=1, scale=1.0, softcap=0.0, real="bert-base, B=8, 20 masked"),
    )

    def derive(self, d: dict[str, int]) -> None:
        d["rows"] = -(-d["N"] // d["chunks"])  # of one chunk
        d["ignore_index"] = IGNORE_INDEX

    def ref(self, v: Any) -> tuple:
        return reference.lm_loss_forward(v), None

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name == "w" and v["C"] > 64:  # small logits: the rounding of large ones dominates all errors of e^z
            return rng.standard_normal(shape) * 0.25
        if arg.name == "weights":
            return 2 * rng.random(shape)
        return _targets(rng, shape, v) if arg.name == "targets" else None

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        chunks = [_losses(c, gpu, first, rows, gradient=False) for first, rows in _chunks(c)]
        return Launches(tuple(step for chunk in chunks for step in chunk))

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["C"] * c.sizes["Vp"]


class LmLossForwardBackward(Op):
    """The loss and its gradient in one pass over the chunks: losses, dx, and dw += ...

    Nothing follows the loss, so its gradient is computed while a chunk of logits exists: no logits are kept or computed
    twice. Gradients are those of scalars.loss_scale * sum(losses); the logits and weights are those of lm_loss.
    """

    name = "lm_loss_forward_backward"
    ins = LmLoss.ins
    outs = "losses:N:f32 dx:N,C? logits:rows,Vp +dw:Vp,C:grad? +db:Vp:grad?"
    attrs = LmLoss.attrs
    params = "w b"
    saved = "dx"
    differentiated = "losses"
    undefined = "logits"
    starts_gradient = True
    cpu = CpuKernel(
        "lm_loss_forward_backward",
        "losses dx dw db x w targets b weights logits scalars scratch"
        " | N C V Vp ignore_index rows scale softcap accumulate.dw accumulate.db threads",
        "lm_loss_scratch N C Vp rows threads",
    )
    cases = (
        *LmLoss.cases,
        case(N=67, C=64, Vp=128, V=97, chunks=3, scale=1.0, softcap=0.0, without="b weights db dw"),
        case(N=67, C=64, Vp=128, V=97, chunks=3, scale=1.0, softcap=0.0, without="weights dx"),
        case(N=9, C=48, Vp=56, V=50, chunks=2, scale=1.0, softcap=0.0, without="weights dw dx"),
    )

    derive = LmLoss.derive
    sample = LmLoss.sample

    def ref(self, v: Any) -> tuple:
        losses, dx, dw, db = reference.lm_loss_forward_backward(v)
        return losses, dx, None, dw, db

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"x": c.dx}

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        C, Vp = c.sizes["C"], c.sizes["Vp"]
        if C >= MIN_C and wgmma_gemm.supports(gpu, c.dtype, C, Vp) and not any(_extras(c).values()):
            return _exponentials(c, gpu)
        steps: list[Gemm | Kernel] = []
        scratch = 0
        for first, rows in _chunks(c):
            steps += _losses(c, gpu, first, rows, gradient=True)
            at = first * C * c.dtype.size
            if c.dw is not None:
                add = "1" if first else "accumulate.dw"
                steps.append(Gemm("dw", "logits", f"x@{at}", Vp, C, rows, ta=True, accumulate=add))
            if c.dx is not None:
                steps.append(Gemm(f"dx@{at}", "logits", "w", rows, C, Vp))
            if c.db is not None:
                add, file = "1" if first else "accumulate.db", "../linear/cuda.cu"
                sums, nbytes = bias_gradient("logits", rows, Vp, c.dtype, gpu, add, file)
                steps, scratch = [*steps, *sums], max(scratch, nbytes)
        return Launches(tuple(steps), scratch)

    def flops(self, c: Call) -> int:
        products = 1 + (c.dw is not None) + (c.dx is not None)
        return 2 * products * c.sizes["N"] * c.sizes["C"] * c.sizes["Vp"]


def _targets(rng: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
    """Random targets, every fifth one ignored."""
    targets = rng.integers(0, v["V"], shape, dtype="int32")
    targets[4::5] = IGNORE_INDEX
    return targets


def _chunks(c: Call) -> list[tuple[int, int]]:
    """First row and number of rows of every chunk."""
    N, rows = c.sizes["N"], c.sizes["rows"]
    return [(first, min(rows, N - first)) for first in range(0, N, rows)]


def _extras(c: Call) -> dict[str, int]:
    """What a call has that GPT-2's head lacks, as defines of cuda.cu."""
    given = {"BIAS": c.b is not None, "SCALED": c.attrs["scale"] != 1, "CAPPED": c.attrs["softcap"] != 0}
    return {name: int(value) for name, value in (given | {"WEIGHTED": c.weights is not None}).items()}


def _losses(c: Call, gpu: Gpu, first: int, rows: int, *, gradient: bool) -> tuple[Gemm, Kernel]:
    """Launches for a chunk: its logits, then its losses; gradient: also overwrites the logits with their gradient."""
    V, Vp, C = (c.sizes[d] for d in ("V", "Vp", "C"))
    vec = 16 // c.dtype.size if Vp % (16 // c.dtype.size) == 0 else 1
    threads = min(1024, -(-Vp // (32 * vec)) * 32)
    shared = 2 * Vp * c.dtype.size  # a row and the next one
    ahead = vec > 1 and shared + 1024 <= gpu.shared_bytes
    blocks = gpu.sms * min(1024 // threads, gpu.shared_bytes // (shared + 1024) if ahead else 32)
    return (
        Gemm("logits", f"x@{first * C * c.dtype.size}", "w", rows, Vp, C, tb=True),
        Kernel(
            "lm_loss_rows_kernel",
            f"losses@{4 * first} logits targets@{4 * first} b weights@{4 * first} scalars | ignore_index scale softcap",
            min(rows, blocks),
            threads,
            shared if ahead else 0,
            {"ROWS": rows, "V": V, "VP": Vp, "VEC": vec, "THREADS": threads}
            | {"AHEAD": int(ahead), "GRADIENT": int(gradient)}
            | _extras(c),
        ),
    )


def _exponentials(c: Call, gpu: Gpu) -> Launches:
    """Losses and gradients without a pass over logits: the GEMM stores e^(logit - target's logit) in their place."""
    C, V, Vp, rows, bf16 = c.sizes["C"], c.attrs["V"], c.sizes["Vp"], c.sizes["rows"], c.dtype.size
    tiles = -(-Vp // wgmma_gemm.TILE_N)
    shift, factor, sums = "scratch", f"scratch@{4 * rows}", f"scratch@{8 * rows}"
    scaled = f"scratch@{-(-(8 * rows + 4 * rows * tiles) // 128) * 128}"
    steps: list[Gemm | Kernel] = []
    for first, n in _chunks(c):
        x, dx = f"x@{first * C * bf16}", f"dx@{first * C * bf16}"
        losses, targets = f"losses@{4 * first}", f"targets@{4 * first}"
        blocks, defines = -(-n // WARPS), {"ROWS": n, "C": C, "V": V, "VP": Vp, "TILES": tiles}  # a warp for each row
        steps += [
            _rows("lm_loss_shift_kernel", f"{shift} {x} w {targets} | ignore_index", blocks, defines),
            wgmma_gemm.launch(
                "lm_loss_exp_gemm_kernel",
                f"tma.{x}:{n}x{C} tma.w tma.logits:{n}x{Vp} {shift} {sums} | {n} Vp C V",
                gpu,
                "exp_gemm.cu",
                A_MN=0,
                B_MN=0,
            ),
            _rows(
                "lm_loss_scale_kernel",
                f"{losses} logits {scaled} {factor} {sums} {shift} {x} w {targets} scalars | ignore_index",
                -(-n // 32),
                defines,
            ),
        ]
        if c.dw is not None:
            steps.append(Gemm("dw", "logits", scaled, Vp, C, n, ta=True, accumulate="1" if first else "accumulate.dw"))
        if c.dx is not None:
            steps += [Gemm(dx, "logits", "w", n, C, Vp), _rows("lm_loss_dx_kernel", f"{dx} {factor}", blocks, defines)]
    scratch = int(scaled.split("@")[1]) + rows * C * bf16
    return Launches(tuple(steps), scratch, note="softmax in the GEMM")


def _rows(entry: str, args: str, blocks: int, defines: dict[str, int]) -> Kernel:
    """A launch of exponentials.cu."""
    return Kernel(entry, args, blocks, 32 * WARPS, defines=defines | {"WARPS": WARPS}, file="exponentials.cu")


lm_loss, lm_loss_forward_backward = LmLoss(), LmLossForwardBackward()
