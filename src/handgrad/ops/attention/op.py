"""attention: self-attention over packed q, k, v without materialising T x T matrices. See README.md."""

from typing import Any

from handgrad.core.dtypes import BF16
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, Case, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import TMA_TILE, Gpu, Kernel, Launches, Sdpa
from handgrad.ops.attention import reference

WARPGROUPS = 2  # that compute in a wgmma kernel, TMA_TILE rows each; one more warpgroup loads
FORWARD_STAGES, BACKWARD_STAGES = 4, 6
L2_SHARE = 16 << 20  # bytes of keys and values that concurrent blocks of an mma kernel stream from L2


def _derive(d: dict[str, int]) -> None:
    H, K, T = d["H"], d["K"], d["T"]
    heads = H if "E" in d else H + 2 * K
    if H % K:
        raise HandgradError("attention", f"the number of key/value heads divides the {H} query heads", K)
    if d["Q"] % heads:
        named = f"{H} heads" if "E" in d else f"{H} + 2 x {K} heads"
        raise HandgradError("attention", f"the width of qkv is a multiple of {named}", d["Q"])
    if d["N"] % T:
        raise HandgradError("attention", f"the number of rows is a multiple of T = {T}", d["N"])
    d["D"], d["B"], d["S"] = d["Q"] // heads, d["N"] // T, T
    d["C"] = H * d["D"]
    if "E" in d:
        if d["E"] != 2 * K * d["D"]:
            raise HandgradError("attention", f"the width of kv is 2 x {K} heads of {d['D']}", d["E"])
        if d["M"] % d["B"]:
            raise HandgradError("attention", f"kv has the same number of rows for each of {d['B']} sequences", d["M"])
        d["S"] = d["M"] // d["B"]
    if d.setdefault("R", 0) % 4 or d["R"] > reference.FAR:
        raise HandgradError("attention", f"rel has a multiple of 4 buckets, at most {reference.FAR}", d["R"])


def _flops(c: Call, products: int) -> int:
    """FLOP of `products` dot products over D for each query and each key that it sees by causal and window; how many
    keys first_key and last_key hide is data."""
    B, T, S, C = (c.sizes[letter] for letter in "BTSC")
    before = max(0, T - c.attrs["window"]) if c.attrs["window"] else 0  # queries beyond the first window
    near = min(T, S)
    keys = near * (near + 1) // 2 + (T - near) * S if c.attrs["causal"] else T * S
    return products * 2 * B * (keys - before * (before + 1) // 2) * C


def _is_plain(c: Call) -> bool:
    """Whether none of the optional inputs is given."""
    return all(t is None for t in (c.kv, c.rel, c.first_key, c.last_key))


def _library(c: Call, gpu: Gpu) -> bool:
    """Whether cuDNN computes this call. Its dropout has other random bits than ours, so only p = 0; its windows are
    causal, and not for deterministic gradients."""
    D, window = c.sizes["D"], c.attrs["window"]
    fits = c.dtype is BF16 and c.attrs["p"] == 0 and D % 8 == 0 and D <= 128 and _is_plain(c)
    return gpu.has_library_attention and fits and (not window or (c.attrs["causal"] and not gpu.deterministic))


def _sdpa(c: Call, gpu: Gpu, direction: str) -> Launches:
    B, T, H, K, D = (c.sizes[letter] for letter in "BTHKD")
    a = c.attrs
    step = Sdpa(direction, B, T, H, K, D, a["causal"], gpu.deterministic, a["window"], a["scale"])
    return Launches((step,), note="cudnn")


def _fits_wgmma(c: Call, gpu: Gpu) -> bool:
    """Whether the wgmma kernels support this call."""
    T, D = c.sizes["T"], c.sizes["D"]
    fits = c.dtype is BF16 and c.attrs["p"] == 0 and D == TMA_TILE and T % (WARPGROUPS * TMA_TILE) == 0
    return gpu.has_wgmma and gpu.has_tma and fits and not c.attrs["window"] and _is_plain(c)


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
    return Kernel(entry, f"{args} | N T H K scale", blocks, threads, shared, defines, file)


def _launch(c: Call, gpu: Gpu, entry: str, args: str, owned: int, keys: bool = False, outputs: int = 1) -> Kernel:
    """A launch of the simt (float32) or mma (bf16) kernel `entry`, in whose name `{}` stands for simt or mma.

    A block keeps rows of `owned` tensors of one head of a sequence, of queries or of `keys`, and streams tiles of two
    other tensors. outputs: what a kernel of backward_mma.cu computes.
    """
    B, T, S, D, p = c.sizes["B"], c.sizes["T"], c.sizes["S"], c.sizes["D"], c.attrs["p"]
    rows, heads = (S, c.sizes["K"]) if keys else (T, c.sizes["H"])
    bounds, buckets = c.first_key is not None or c.last_key is not None, c.sizes["R"]
    defines = {"D": D, "CAUSAL": int(c.attrs["causal"]), "DROPOUT": int(p > 0), "WINDOW": c.attrs["window"]}
    defines |= {"BOUNDS": int(bounds), "CROSS": int(c.kv is not None), "BUCKETS": buckets}
    args += " scalars | N T S H K scale p stream"
    biases = 8 * (2 * reference.FAR + 1) if buckets else 0  # bytes of shared memory: biases and buckets
    sums = 4 * (2 * reference.FAR + 1) if buckets else 0  # for each warp, of drel
    if c.dtype is not BF16:
        tile, threads, row, file = 32, 128, D | 1, "simt.cu"
        shared, static = (owned + 2) * tile * row * 4, biases + 4 * sums
        defines |= {"ROWS": tile, "THREADS": threads, "LD": row}
    else:
        is_general = p > 0 or c.attrs["window"] or bounds or buckets
        tall = 2 if D <= 64 and not is_general else 1  # 16-row tiles of a warp, limited by registers
        row = -(-D // 16) * 16 + 8  # elements of a row in shared memory
        stats = 2 * 16 * 8 * (2 if bounds else 1)  # bytes of a warp: statistics and ranges of two tiles

        def shared_bytes(warps: int) -> tuple[int, int]:
            dynamic = warps * ((owned * 16 * tall + 2 * 2 * 16) * 2 * row + stats * (owned - 1))
            return dynamic, biases + warps * (sums + (16 * 33 * 4 if buckets else 0))

        warps = 4 if 2 * sum(shared_bytes(4)) <= gpu.shared_bytes else 2
        tile, threads, (shared, static) = 16 * tall * warps, 32 * warps, shared_bytes(warps)
        file = "forward_mma.cu" if owned == 1 else "backward_mma.cu"
        together = max(1, L2_SHARE // (4 * S * D))
        defines |= {"WARPS": warps, "TALL": tall, "QUADS": int(S % 4 == 0), "TOGETHER": together, "LD": row}
        defines |= {"OUTPUTS": outputs} if owned > 1 else {}
    if D > 256 or shared + static > gpu.shared_bytes:
        rule = f"cuda kernels take heads of at most 256 elements, and {gpu.shared_bytes} bytes of shared memory"
        raise HandgradError("attention", rule, f"heads of {D} with {shared + static} bytes")
    kind = "mma" if c.dtype is BF16 else "simt"
    return Kernel(entry.format(kind), args, -(-rows // tile) * B * heads, threads, shared, defines, file)


def _own_backward(c: Call, gpu: Gpu, stats: int) -> Launches:
    """dq, then dk and dv, then drel, by the simt or mma kernels. stats: bytes of the rows' statistics in scratch."""
    H, R, wide = c.sizes["H"], c.sizes["R"], c.dtype is BF16 and c.sizes["D"] > 128
    args = f"dqkv scratch scratch@{stats} dy qkv {OPTIONAL} y lse"
    dq = _launch(c, gpu, "attention_backward_dq_{}_kernel", args, 2, outputs=1 if wide else 3)
    steps, blocks = [dq], dq.grid if isinstance(dq.grid, int) else dq.grid[0]
    for outputs in (1, 2) if wide else (3,):  # dk, dv, both
        args = f"dqkv dkv scratch dy qkv {OPTIONAL}"
        steps.append(_launch(c, gpu, "attention_backward_dkdv_{}_kernel", args, 2, True, outputs))
    if c.drel is not None:
        args = f"drel scratch@{stats} | B H R {blocks // (c.sizes['B'] * H)} accumulate.drel"
        threads = 128
        drel = {"THREADS": threads}
        steps.append(Kernel("attention_backward_drel_kernel", args, R * H, threads, defines=drel, file="drel.cu"))
    return Launches(tuple(steps), scratch=stats + 4 * blocks * R, note="own")


OPTIONAL = "kv rel first_key last_key"  # inputs


def _case(*, real: str = "", given: str = "", window: int = 0, **sizes: Any) -> Case:
    """A case with the optional inputs `given`."""
    absent = [name for name in OPTIONAL.split() if name not in given.split()]
    without = " ".join([*absent, "drel"] if "rel" in absent else absent)
    heads = sizes["H"] + (0 if "kv" in given.split() else 2 * sizes["K"])
    sizes = {"scale": (sizes["Q"] // heads) ** -0.5, "window": window} | sizes
    return case(real, without, **sizes)


CASES = (
    _case(N=34, Q=48, T=17, H=2, K=2, causal=True, p=0.0, stream=1),
    _case(N=1, Q=3, T=1, H=1, K=1, causal=True, p=0.0, stream=1),
    _case(N=130, Q=99, T=65, H=1, K=1, causal=True, p=0.25, stream=2),
    _case(N=128, Q=384, T=64, H=4, K=2, causal=False, p=0.25, stream=3),
    _case(N=200, Q=400, T=200, H=3, K=1, causal=True, p=0.0, stream=1),
    _case(N=130, Q=320, T=130, H=6, K=2, causal=False, p=0.0, stream=1),
    _case(N=256, Q=256, T=128, H=2, K=1, causal=True, p=0.0, stream=1),
    _case(N=384, Q=192, T=384, H=1, K=1, causal=False, p=0.0, stream=1),
    _case(N=130, Q=192, T=65, H=1, K=1, causal=True, p=0.0, stream=1),
    # windows: of one key, shorter than a tile, of several tiles; another scale
    _case(N=14, Q=12, T=7, H=2, K=1, causal=True, p=0.0, stream=1, window=1),
    _case(N=300, Q=99, T=150, H=1, K=1, causal=True, p=0.25, stream=2, window=37, scale=0.3),
    _case(N=520, Q=192, T=260, H=1, K=1, causal=True, p=0.0, stream=1, window=100),
    _case(N=128, Q=192, T=128, H=1, K=1, causal=True, p=0.0, stream=1, scale=1 / 16),
    # documents, padding, rows that see nothing
    _case(N=390, Q=120, T=195, H=3, K=1, causal=True, p=0.0, stream=1, given="first_key"),
    _case(N=402, Q=99, T=201, H=1, K=1, causal=False, p=0.25, stream=2, given="first_key last_key"),
    _case(N=300, Q=192, T=300, H=1, K=1, causal=True, p=0.0, stream=1, window=50, given="first_key"),
    # wide heads
    _case(N=150, Q=768, T=75, H=1, K=1, causal=True, p=0.0, stream=1, window=40),
    # keys and values of another length; biases by distance
    _case(N=14, Q=10, M=10, E=10, T=7, H=2, K=1, causal=False, p=0.0, stream=1, given="kv"),
    _case(N=90, Q=96, M=286, E=64, T=45, H=3, K=1, causal=False, p=0.25, stream=1, given="kv last_key"),
    _case(N=34, Q=48, R=8, T=17, H=2, K=2, causal=True, p=0.0, stream=1, scale=1.0, given="rel"),
    _case(N=350, Q=198, R=32, T=175, H=2, K=2, causal=False, p=0.25, stream=2, scale=1.0, given="rel last_key"),
    _case(N=576, Q=192, R=32, T=288, H=1, K=1, causal=True, p=0.0, stream=1, given="rel first_key"),
    _case(N=1024, Q=2304, T=256, H=12, K=12, causal=True, p=0.0, stream=1, real="gpt2-124m, B=4 T=256"),
)


class Attention(Op):
    """y = dropout(softmax(scale q k' + bias)) v for every head;  lse = logsumexp of the scores.

    Query head h reads key/value head h / (H / K). causal: a token sees those up to itself. window: of those the last
    `window`, itself included; 0: all. p: dropout. kv: keys and values of another sequence of S = M / B tokens; qkv then
    holds q alone. rel: a bias for each head and bucket of the distance key - query (T5). first_key, last_key: row n
    sees keys first_key[n] .. last_key[n] of its sequence alone, or none if first_key[n] > last_key[n]: y and lse are 0.
    """

    name = "attention"
    ins = "qkv:N,Q kv:M,E? rel:R,H? first_key:N:i32? last_key:N:i32?"
    outs = "y:N,C lse:B,H,T:f32"
    attrs = {
        "T": int,
        "H": int,
        "K": int,
        "causal": bool,
        "window": int,
        "scale": float,
        "p": float,
        "stream": int,
    }
    params = "rel"
    saved = "qkv kv rel first_key last_key y lse"
    kept = "y lse"
    cpu = CpuKernel(
        "attention_forward",
        "y lse qkv kv rel first_key last_key scalars scratch | N T S H K D R causal window scale p stream",
        "attention_forward_scratch T S D threads",
    )
    cases = CASES

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return reference.attention_forward(v)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return reference.sample(arg.name, v)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        into = {"drel": g.wanted_grad(c.rel)}
        ins = d["y"], c.qkv, c.kv, c.rel, c.first_key, c.last_key, c.y, c.lse
        dqkv, dkv = g.emit(attention_backward, *ins, into=into, **c.attrs)
        return {"qkv": dqkv} if c.kv is None else {"qkv": dqkv, "kv": dkv}

    def flops(self, c: Call) -> int:
        return _flops(c, 2)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        library = _sdpa(c, gpu, "forward") if _library(c, gpu) else None
        if _fits_wgmma(c, gpu):
            kernel = _wgmma(c, gpu, "attention_forward_wgmma_kernel", "tma.y tma.qkv lse", c.sizes["H"])
            return Launches((kernel,), note="wgmma", alternative=library)
        if library is not None:
            return library
        kernel = _launch(c, gpu, "attention_forward_{}_kernel", f"y lse qkv {OPTIONAL}", 1)
        return Launches((kernel,), note="own")


class AttentionBackward(Op):
    """dqkv, dkv and drel from dy; recomputes the probabilities from lse."""

    name = "attention_backward"
    ins = "dy:N,C qkv:N,Q kv:M,E? rel:R,H? first_key:N:i32? last_key:N:i32? y:N,C lse:B,H,T:f32"
    outs = "dqkv:N,Q dkv:M,E? +drel:R,H:grad?"
    attrs = Attention.attrs
    ill_conditioned = True  # exp(q k' - lse) and dy v' - delta
    cpu = CpuKernel(
        "attention_backward",
        "dqkv dkv drel dy qkv kv rel first_key last_key y lse scalars scratch"
        " | N T S H K D R causal window scale p stream accumulate.drel",
        "attention_backward_scratch N T S H K D R threads",
    )
    cases = CASES

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return reference.attention_backward(v)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return reference.sample(arg.name, v)

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
        return _own_backward(c, gpu, stats)


attention, attention_backward = Attention(), AttentionBackward()
