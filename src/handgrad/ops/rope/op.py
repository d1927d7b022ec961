"""rope: rotary positions on packed q, k, v, after an optional RMS norm of every query and key head. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.rope import reference

THREADS, SUM_THREADS = 256, 1024  # of a CUDA block; of one that adds partial sums
BLOCKS_PER_SM = 2  # of the kernel that sums the weights' gradients: up to 128 registers a thread
MOST_COLUMNS = 256  # of a head on a GPU: a lane keeps its share in registers


def _derive(d: dict[str, int]) -> None:
    H, K = d["H"], d["K"]
    if d["Q"] % (H + 2 * K):
        raise HandgradError("rope", f"the width of qkv is a multiple of {H} + 2 x {K} heads", d["Q"])
    D = d["Q"] // (H + 2 * K)
    if d.setdefault("D", D) != D:
        raise HandgradError("rope", f"the weights of the norms have {D} elements, as heads have", d["D"])
    if d["R"] % 2 or not 0 < d["R"] <= D:
        raise HandgradError("rope", f"the rotary dimensions are even, and at most the {D} of a head", d["R"])
    if d["N"] % d["T"]:
        raise HandgradError("rope", f"the number of rows is a multiple of T = {d['T']}", d["N"])
    if d["T"] > d["S"]:
        raise HandgradError("rope", f"the table has at least {d['T']} rows, one per position", d["S"])


def _table(arg: Any, shape: tuple[int, ...]) -> Any:
    """A table of angles for the input `table` of a case."""
    return reference.rotary_table(shape[0], shape[1], 10000.0) if arg.name == "table" else None


def _nbytes(c: Call, total: int) -> int:
    """`total`, with the rows of the table that T positions read in place of all."""
    return total - c.table.nbytes + c.attrs["T"] * c.sizes["R"] * c.table.dtype.size


class Rope(Op):
    """y = qkv with the heads of q and k rotated by the angles of their position, n mod T, in decode scalars.position +
    n mod T. wq, wk: weights of an RMS norm of every head of q, k before the rotation. v is copied."""

    name = "rope"
    ins = "qkv:N,Q table:S,R:f32 wq:D? wk:D?"
    outs = "y:N,Q"
    attrs = {"T": int, "H": int, "K": int, "eps": float, "decode": bool, "interleaved": bool}
    params = "wq wk"
    saved = "qkv wq wk"  # qkv only with norms
    cpu = CpuKernel(
        "rope_forward",
        "y qkv table wq wk scalars scratch | N T H K D R eps decode interleaved",
        "rope_scratch D threads",
    )
    cases = (
        case(N=14, Q=48, S=9, R=8, T=7, H=4, K=1, eps=1e-2, decode=False, interleaved=False),
        case(N=1, Q=6, S=1, R=2, T=1, H=1, K=1, eps=1.0, decode=False, interleaved=False),
        case(N=7, Q=165, S=7, R=6, T=7, H=3, K=1, eps=1e-5, decode=False, interleaved=False),
        case(N=7, Q=165, S=8, R=32, T=7, H=1, K=2, eps=1e-5, decode=True, interleaved=True),
        case(N=6, Q=192, S=6, R=64, T=6, H=1, K=1, eps=1e-5, decode=False, interleaved=True),
        case(N=9, Q=640, S=3, R=20, T=3, H=4, K=2, eps=1e-5, decode=False, interleaved=False, without="wq wk"),
        case(N=6, Q=512, S=8, R=128, T=3, H=2, K=1, eps=1e-6, decode=True, interleaved=False),
        case(N=6, Q=768, S=3, R=256, T=3, H=1, K=1, eps=1e-6, decode=False, interleaved=False, without="wq"),
        case(N=5, Q=192, S=5, R=16, T=5, H=1, K=1, eps=0.0, decode=False, interleaved=False, without="wq wk"),
        case(N=1024, Q=3072, S=256, R=64, T=256, H=32, K=8, eps=0.0, decode=False, interleaved=False,
             without="wq wk", real="llama-3.2-1b, B=4 T=256"),
        case(N=1024, Q=4096, S=256, R=128, T=256, H=16, K=8, eps=1e-6, decode=False, interleaved=False,
             real="qwen3-0.6b, B=4 T=256"),
    )  # fmt: skip

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        position = int(v.scalars.position) if v.decode else 0
        return (reference.rope_forward(v.qkv, v.table, v.wq, v.wk, v.T, v.H, v.K, v.eps, v.interleaved, position),)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        into = {"dwq": g.wanted_grad(c.wq), "dwk": g.wanted_grad(c.wk)}
        qkv = c.qkv if _normed(c) else None  # a rotation alone is undone without its input
        attrs = {k: v for k, v in c.attrs.items() if k != "decode"}
        return {"qkv": g.emit(rope_backward, d["y"], qkv, c.table, c.wq, c.wk, into=into, **attrs)}

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "act"} if _normed(c) else {}  # with norms backward keeps qkv anyway; without, y replaces it

    def nbytes(self, c: Call) -> int:
        """Counts T rows of the table."""
        return _nbytes(c, super().nbytes(c))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _rotation(c, "y qkv table wq wk scalars | N T eps decode", inverse=False)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _table(arg, shape)


class RopeBackward(Op):
    """dqkv = the norms' gradients of dy rotated back;  dwq += sum of rotated-back dy * normed q;  dwk likewise. qkv is
    absent where wq and wk are."""

    name = "rope_backward"
    ins = "dy:N,Q qkv:N,Q? table:S,R:f32 wq:D? wk:D?"
    outs = "dqkv:N,Q +dwq:D:grad? +dwk:D:grad?"
    attrs = {"T": int, "H": int, "K": int, "eps": float, "interleaved": bool}
    cpu = CpuKernel(
        "rope_backward",
        "dqkv dwq dwk dy qkv table wq wk scratch | N T H K D R eps interleaved accumulate.dwq accumulate.dwk",
        "rope_backward_scratch N D threads",
    )
    cases = (
        case(N=14, Q=48, S=9, R=8, T=7, H=4, K=1, eps=1e-2, interleaved=False),
        case(N=1, Q=6, S=1, R=2, T=1, H=1, K=1, eps=1.0, interleaved=False),
        case(N=7, Q=165, S=7, R=6, T=7, H=3, K=1, eps=1e-5, interleaved=False),
        case(N=100, Q=165, S=20, R=32, T=20, H=1, K=2, eps=1e-2, interleaved=True),
        case(N=6, Q=192, S=6, R=64, T=6, H=1, K=1, eps=1e-2, interleaved=True),
        case(N=900, Q=640, S=300, R=128, T=300, H=3, K=1, eps=1e-2, interleaved=False),
        case(N=9, Q=640, S=3, R=20, T=3, H=4, K=2, eps=0.0, interleaved=False, without="qkv wq wk dwq dwk"),
        case(N=6, Q=512, S=8, R=128, T=3, H=2, K=1, eps=0.0, interleaved=True, without="qkv wq wk dwq dwk"),
        case(N=6, Q=768, S=3, R=256, T=3, H=1, K=1, eps=1e-2, interleaved=False, without="wq dwq"),
        case(N=6, Q=192, S=6, R=64, T=6, H=1, K=1, eps=1e-2, interleaved=False, without="dwq dwk"),
        case(N=1024, Q=3072, S=256, R=64, T=256, H=32, K=8, eps=0.0, interleaved=False,
             without="qkv wq wk dwq dwk", real="llama-3.2-1b, B=4 T=256"),
        case(N=1024, Q=4096, S=256, R=128, T=256, H=16, K=8, eps=1e-6, interleaved=False,
             real="qwen3-0.6b, B=4 T=256"),
    )  # fmt: skip

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return reference.rope_backward(v.dy, v.qkv, v.table, v.wq, v.wk, v.T, v.H, v.K, v.eps, v.interleaved)

    def nbytes(self, c: Call) -> int:
        """Counts T rows of the table."""
        return _nbytes(c, super().nbytes(c))

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        if not _normed(c):
            return _rotation(c, "dqkv dy table wq wk scalars | N T eps 0", inverse=True)
        d, D = _layout(c), c.sizes["D"]
        groups = THREADS // d["LANES"]
        blocks = min(-(-c.sizes["N"] * d["HEADS"] // groups), gpu.sms * BLOCKS_PER_SM)
        d |= {"SUMS": 1, "BLOCKS": blocks, "BLOCKS_PER_SM": BLOCKS_PER_SM, "SUM_THREADS": SUM_THREADS}
        args, add = "dqkv scratch dy qkv table wq wk | N T eps", "dwq dwk scratch | accumulate.dwq accumulate.dwk"
        kernel = Kernel("rope_backward_kernel", args, blocks, THREADS, groups * 2 * D * 4, d)
        sums = Kernel("rope_backward_sum_kernel", add, -(-2 * D // 32), SUM_THREADS, 0, d)
        is_learning = c.dwq is not None or c.dwk is not None
        return Launches((kernel, sums) if is_learning else (kernel,), scratch=blocks * 2 * D * 4)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _table(arg, shape)


def _normed(c: Call) -> bool:
    """Whether q or k is normed."""
    return c.wq is not None or c.wk is not None


def _layout(c: Call) -> dict[str, int]:
    """How lanes divide a head: a lane takes two packs of VEC elements, which its pairs are made of."""
    D, R, H, K = (c.sizes[letter] for letter in "DRHK")
    if D > MOST_COLUMNS:
        raise HandgradError("rope", f"cuda kernels take heads of at most {MOST_COLUMNS} elements", D)
    vec = 16 // c.dtype.size
    while vec > 1 and (R % (2 * vec) or D % (2 * vec)):
        vec //= 2
    lanes = min(32, 1 << (-(-D // (2 * vec)) - 1).bit_length())
    d = {"D": D, "ROTARY": R, "VEC": vec, "LANES": lanes, "QUERIES": H, "KEYS": K, "HEADS": H + 2 * K}
    return d | {"THREADS": THREADS, "INTERLEAVED": int(c.attrs["interleaved"]), "SUMS": 0}


def _rotation(c: Call, args: str, inverse: bool) -> Launches:
    d = _layout(c) | {"SIGN": -1 if inverse else 1, "NORM": int(_normed(c))}
    blocks = -(-c.sizes["N"] * d["HEADS"] * d["LANES"] // THREADS)
    return Launches((Kernel("rope_kernel", args, blocks, THREADS, 0, d),))


rope, rope_backward = Rope(), RopeBackward()
