"""attention: self-attention over packed q, k, v without materialising T x T matrices. See README.md."""

from typing import Any

from handgrad.core.dtypes import BF16
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import TMA_TILE, Gpu, Kernel, Launches, Sdpa
from handgrad.ops.attention import reference

WARPGROUPS = 2  # that compute in a wgmma kernel, TMA_TILE rows each; one more warpgroup loads
FORWARD_STAGES, BACKWARD_STAGES = 4, 6
L2_SHARE = 16 << 20  # bytes of keys and values that concurrent blocks of an mma kernel stream from L2


def _derive(d: dict[str, int]) -> None:
    H, K = d["H"], d["K"]
    if H % K:
        raise HandgradError("attention", f"the number of key/value heads divides the {H} query heads", K)
    if d["Q"] % (H + 2 * K):
        raise HandgradError("attention", f"the width of qkv is a multiple of {H} + 2 x {K} heads", d["Q"])
    if d["N"] % d["T"]:
        raise HandgradError("attention", f"the number of rows is a multiple of T = {d['T']}", d["N"])
    d["D"], d["B"] = d["Q"] // (H + 2 * K), d["N"] // d["T"]
    d["C"] = H * d["D"]


def _flops(c: Call, products: int) -> int:
    """FLOP of `products` dot products over D for each query and each key that it sees."""
    N, T, C = (c.sizes[letter] for letter in "NTC")
    return products * N * (T + 1 if c.attrs["causal"] else 2 * T) * C


def _library(c: Call, gpu: Gpu) -> bool:
    """Whether cuDNN computes this call. Its dropout has other random bits than ours, so only p = 0."""
    D = c.sizes["D"]
    return gpu.has_library_attention and c.dtype is BF16 and c.attrs["p"] == 0 and D % 8 == 0 and D <= 128


def _sdpa(c: Call, gpu: Gpu, direction: str) -> Launches:
    B, T, H, K, D = (c.sizes[letter] for letter in "BTHKD")
    return Launches((Sdpa(direction, B, T, H, K, D, c.attrs["causal"], gpu.deterministic),), note="cudnn")


def _fits_wgmma(c: Call, gpu: Gpu) -> bool:
    """Whether the wgmma kernels support this call."""
    T, D = c.sizes["T"], c.sizes["D"]
    fits = c.dtype is BF16 and c.attrs["p"] == 0 and D == TMA_TILE and T % (WARPGROUPS * TMA_TILE) == 0
    return gpu.has_wgmma and gpu.has_tma and fits


def _shared_bytes(stages: int, tiles: int, own: int, stats: int) -> int:
    """Bytes of shared memory of a wgmma kernel: `tiles` TMA tiles and `stats` rows of statistics per stage, `own` tiles
    per warpgroup, barriers, and 1024 bytes for alignment."""
    data = (WARPGROUPS * own + stages * tiles) * TMA_TILE * TMA_TILE * 2 + stages * stats * 8
    return data + 16 * (stages + 1) + 1024


def _wgmma(c: Call, gpu: Gpu, entry: str, args: str, heads: int) -> Kernel:
    """A launch of persistent blocks. A warpgroup computes tiles of rows, each of one of `heads` heads of a sequence."""
    B, T = c.sizes["B"], c.sizes["T"]
    if entry == "attention_forward_wgmma_kernel":  # a stage: two tiles of k and of v; own: q and y
        file, stages, shared = "forward_wgmma.cu", FORWARD_STAGES, _shared_bytes(FORWARD_STAGES, 4, 2, 0)
    else:  # a stage: k and v, or q, dy and their statistics; own: q, dy and y, or k and v, and two outputs
        file, stages, shared = "backward_wgmma.cu", BACKWARD_STAGES, _shared_bytes(BACKWARD_STAGES, 2, 5, TMA_TILE)
    streamed = gpu.sms * 4 * T * TMA_TILE  # bytes of keys and values, if every SM streams another head
    parts = -(-streamed // (gpu.l2_bytes * 18 // 25))  # 72 % of L2: 36 MiB on an H100
    threads = 128 * (WARPGROUPS + 1)
    defines = {
        "TMA_TILE": TMA_TILE,
        "WARPGROUPS": WARPGROUPS,
        "THREADS": threads,
        "STAGES": stages,
        "SHARED_BYTES": shared,
        "CAUSAL": int(c.attrs["causal"]),
        "TOGETHER": max(1, gpu.sms // parts),  # heads at a time: the blocks of a round have equal work
    }
    blocks = min(gpu.sms, T // (WARPGROUPS * TMA_TILE) * B * heads)
    return Kernel(entry, f"{args} | N T H K", blocks, threads, shared, defines, file)


def _launch(c: Call, gpu: Gpu, entry: str, args: str, heads: int, owned: int) -> Kernel:
    """A launch of the simt (float32) or mma (bf16) kernel `entry`, in whose name `{}` stands for simt or mma. A block
    keeps rows of `owned` tensors of one of `heads` heads of a sequence, and streams tiles of two other tensors."""
    B, T, D, p = c.sizes["B"], c.sizes["T"], c.sizes["D"], c.attrs["p"]
    if D > 128:
        raise HandgradError("attention", "cuda kernels take heads of at most 128 elements", D)
    defines = {"D": D, "CAUSAL": int(c.attrs["causal"]), "DROPOUT": int(p > 0)}
    args += " scalars | N T H K p stream"
    if c.dtype is not BF16:
        rows, threads, row = 32, 128, D | 1
        shared = (owned + 2) * rows * row * 4
        defines |= {"ROWS": rows, "THREADS": threads, "LD": row}
        return Kernel(entry.format("simt"), args, -(-T // rows) * B * heads, threads, shared, defines, "simt.cu")
    tall = 2 if D <= 64 and p == 0 else 1  # 16-row tiles of a warp, limited by registers
    row = -(-D // 16) * 16 + 8  # elements of a row in shared memory

    def shared_bytes(warps: int) -> int:
        return warps * ((owned * 16 * tall + 2 * 2 * 16) * 2 * row + 2 * 16 * 8)

    warps = 4 if 2 * shared_bytes(4) <= gpu.shared_bytes else 2
    together = max(1, L2_SHARE // (4 * T * D))
    defines |= {"WARPS": warps, "TALL": tall, "QUADS": int(T % 4 == 0), "TOGETHER": together, "LD": row}
    blocks, shared = -(-T // (16 * tall * warps)) * B * heads, shared_bytes(warps)
    file = "forward_mma.cu" if owned == 1 else "backward_mma.cu"
    return Kernel(entry.format("mma"), args, blocks, 32 * warps, shared, defines, file)


class Attention(Op):
    """y = dropout(softmax(q k' / sqrt(D))) v for every head;  lse = logsumexp of the scores. Query head h reads
    key/value head h / (H / K). causal: a token sees those up to itself. p: dropout."""

    name = "attention"
    ins = "qkv:N,Q"
    outs = "y:N,C lse:B,H,T:f32"
    attrs = {"T": int, "H": int, "K": int, "causal": bool, "p": float, "stream": int}
    saved = "qkv y lse"
    kept = "y lse"
    cpu = CpuKernel(
        "attention_forward",
        "y lse qkv scalars scratch | N T H K D causal p stream",
        "attention_forward_scratch T D threads",
    )
    cases = (
        case(N=34, Q=48, T=17, H=2, K=2, causal=True, p=0.0, stream=1),
        case(N=1, Q=3, T=1, H=1, K=1, causal=True, p=0.0, stream=1),
        case(N=130, Q=99, T=65, H=1, K=1, causal=True, p=0.25, stream=2),
        case(N=128, Q=384, T=64, H=4, K=2, causal=False, p=0.25, stream=3),
        case(N=200, Q=400, T=200, H=3, K=1, causal=True, p=0.0, stream=1),
        case(N=130, Q=320, T=130, H=6, K=2, causal=False, p=0.0, stream=1),
        case(N=256, Q=256, T=128, H=2, K=1, causal=True, p=0.0, stream=1),
        case(N=384, Q=192, T=384, H=1, K=1, causal=False, p=0.0, stream=1),
        case(N=1024, Q=2304, T=256, H=12, K=12, causal=True, p=0.0, stream=1, real="gpt2-124m, B=4 T=256"),
    )

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        return reference.attention_forward(v.qkv, v.T, v.H, v.K, v.causal, v.p, v.stream, k.seed, k.step, k.micro_step)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"qkv": g.emit(attention_backward, d["y"], c.qkv, c.y, c.lse, **c.attrs)}

    def flops(self, c: Call) -> int:
        return _flops(c, 2)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        library = _sdpa(c, gpu, "forward") if _library(c, gpu) else None
        if _fits_wgmma(c, gpu):
            kernel = _wgmma(c, gpu, "attention_forward_wgmma_kernel", "tma.y tma.qkv lse", c.sizes["H"])
            return Launches((kernel,), note="wgmma", alternative=library)
        kernel = _launch(c, gpu, "attention_forward_{}_kernel", "y lse qkv", c.sizes["H"], 1)
        return library or Launches((kernel,), note="own")


class AttentionBackward(Op):
    """dqkv from dy; recomputes the probabilities from lse."""

    name = "attention_backward"
    ins = "dy:N,C qkv:N,Q y:N,C lse:B,H,T:f32"
    outs = "dqkv:N,Q"
    attrs = Attention.attrs
    ill_conditioned = True  # exp(q k' - lse) and dy v' - delta
    cpu = CpuKernel(
        "attention_backward",
        "dqkv dy qkv y lse scalars scratch | N T H K D causal p stream",
        "attention_backward_scratch T H K D threads",
    )
    cases = Attention.cases

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        k = v.scalars
        return (
            reference.attention_backward(
                v.dy, v.qkv, v.y, v.lse, v.T, v.H, v.K, v.causal, v.p, v.stream, k.seed, k.step, k.micro_step
            ),
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name in ("y", "lse"):  # the forward's outputs for this qkv, with the step scalars of every check
            y, lse = reference.attention_forward(
                v["qkv"], v["T"], v["H"], v["K"], v["causal"], v["p"], v["stream"], 7, 3, 0
            )
            return y if arg.name == "y" else lse
        return None

    def flops(self, c: Call) -> int:
        return _flops(c, 5)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        library = _sdpa(c, gpu, "backward") if _library(c, gpu) else None
        rows = -(-c.sizes["T"] // 128) * 128  # whole blocks
        stats = 8 * c.sizes["B"] * c.sizes["H"] * rows  # two floats per row
        if _fits_wgmma(c, gpu):
            args = "tma.dqkv tma.dy tma.qkv", "tma.y scratch lse", "scratch"
            dq = _wgmma(c, gpu, "attention_backward_dq_wgmma_kernel", f"{args[0]} {args[1]}", c.sizes["H"])
            dkdv = _wgmma(c, gpu, "attention_backward_dkdv_wgmma_kernel", f"{args[0]} {args[2]}", c.sizes["K"])
            return Launches((dq, dkdv), scratch=stats, note="wgmma", alternative=library)
        if library is not None:
            return library
        dq = _launch(c, gpu, "attention_backward_dq_{}_kernel", "dqkv scratch dy qkv y lse", c.sizes["H"], 2)
        dkdv = _launch(c, gpu, "attention_backward_dkdv_{}_kernel", "dqkv scratch dy qkv", c.sizes["K"], 2)
        return Launches((dq, dkdv), scratch=stats, note="own")


attention, attention_backward = Attention(), AttentionBackward()
