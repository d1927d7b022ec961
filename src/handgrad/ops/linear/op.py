"""linear: y = act(x w^T + b), and its gradient calls. See README.md."""

from dataclasses import replace
from typing import Any

from handgrad.core.dtypes import BF16, DType
from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gemm, Gpu, Kernel, Launches
from handgrad.ops import wgmma_gemm
from handgrad.ops.act import Act
from handgrad.ops.add.op import add
from handgrad.ops.linear import reference

THREADS, SUM_THREADS = 256, 1024  # of a CUDA block; of one that adds partial sums of db
ACT_PACKS, ACT_BACKWARD_PACKS = 4, 2  # accesses per thread in the activation and in its gradient
DEFINES = {"THREADS": THREADS, "SUM_THREADS": SUM_THREADS}
DEFINES |= {"ACT_PACKS": ACT_PACKS, "ACT_BACKWARD_PACKS": ACT_BACKWARD_PACKS}
WEIGHT_GRADIENT = {"A_MN": 1, "B_MN": 1, "REDUCE_THREADS": 128}  # defines of weight_gradient.cu
MIN_ROWS = 8192  # N from which our fused GEMM can beat the library's GEMM plus a pass over dy
OTHERS = (Act.GELU_ERF, Act.RELU, Act.SILU, Act.TANH)  # that no GEMM of the GPU's library has in its epilogue


class Linear(Op):
    """y = x w^T + b; with an activation: pre = x w^T + b, y = act(pre). `keep_pre` stores pre for backward.

    If `pre_x` is given, it is the `pre` of another linear, and x its y: backward then returns the gradient of pre_x
    instead of x, with the derivative of that linear's activation fused into the GEMM where the library can.
    """

    name = "linear"
    ins = "x:N,K w:M,K b:M? pre_x:N,K?"
    outs = "y:N,M pre:N,M?"
    attrs = {"act": Act, "keep_pre": bool}
    params = "w b"
    saved = "x w pre pre_x"
    cpu = CpuKernel("linear_forward", "y pre x w b scratch | N M K act threads", "linear_scratch N M K threads")
    cases = (
        case(N=7, K=33, M=19, act=Act.NONE, keep_pre=False, without="pre_x"),
        case(N=1, K=1, M=1, act=Act.GELU_TANH, keep_pre=True, without="pre_x"),
        case(N=65, K=96, M=130, act=Act.GELU_TANH, keep_pre=True, without="pre_x"),
        case(N=40, K=64, M=48, act=Act.GELU_TANH, keep_pre=True, without="pre_x"),
        case(N=1, K=64, M=257, act=Act.NONE, keep_pre=False, without="b pre_x"),
        *(case(N=9, K=24, M=40, act=act, keep_pre=True, without="pre_x") for act in OTHERS),
        case(N=1024, K=768, M=3072, act=Act.GELU_TANH, keep_pre=True, without="pre_x", real="gpt2-124m, B=4 T=256"),
        case(N=1024, K=3072, M=768, act=Act.NONE, keep_pre=False, without="pre_x", real="gpt2-124m, B=4 T=256"),
        case(N=4, K=768, M=3072, act=Act.GELU_TANH, keep_pre=False, without="pre_x", real="gpt2-124m, decoding B=4"),
    )

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return attrs["keep_pre"]

    def ref(self, v: Any) -> tuple:
        pre = v.round(reference.linear_forward(v.x, v.w, v.b))  # act of the stored value: the same bits if recomputed
        return reference.act_forward(pre, v.act), pre

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        dy, dpre = d["y"], d.get("pre")  # a reader of y that took pre returns dpre
        if dy is not None and c.attrs["act"]:
            dy = g.emit(linear_act_backward, dy, c.pre, act=c.attrs["act"])
        if dpre is not None:
            dy = dpre if dy is None else g.emit(add, dy, dpre)
        into = {"dw": g.wanted_grad(c.w), "db": g.wanted_grad(c.b)}
        if any(into.values()):  # before dx: it overlaps dx now, and its reduction can start early later
            g.emit(linear_backward_w, dy, None if into["dw"] is None else c.x, into=into)
        if not g.wants(c.x):
            return {}
        act = Act.NONE if c.pre_x is None else g.producer[c.pre_x].attrs["act"]
        dx0 = g.take(c.x)  # of other readers of x: the GEMM adds it
        dx = g.emit(linear_backward_x, dy, c.w, c.pre_x, dx0, act=act)
        return {"x" if c.pre_x is None else "pre_x": dx}

    def reads(self, g: Recorder, c: Call) -> set[str]:
        return super().reads(g, c) - ({"x"} if g.wanted_grad(c.w) is None else set())

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, M, K = (c.sizes[d] for d in "NMK")
        act, wide = c.attrs["act"], _vec(c.dtype, M, K) > 1
        gemm = Gemm("y", "x", "w", N, M, K, tb=True)
        to = "y" if c.pre is None else "pre"
        steps: list[Gemm | Kernel] = [replace(gemm, out=to)]
        if c.b is not None and wide:
            steps = [replace(gemm, out=to, epilogue="bias", bias="b")]
        elif c.b is not None:
            steps.append(_kernel("linear_bias_kernel", f"{to} b | N M", min(N, 8 * gpu.sms)))
        if act:  # of the rounded value, so that recomputing y from a kept `pre` gives the same bits
            steps.append(_elementwise("linear_act_kernel", f"y {to} | N M", c, N * M, packs=ACT_PACKS))
        separate = Launches(tuple(steps))
        if c.pre is not None and c.b is not None and _fuses(c) and not gpu.deterministic:
            fused = (replace(gemm, epilogue="gelu", bias="b", aux="pre"),)
            return Launches(fused, note="gelu in the GEMM", alternative=separate)
        return separate

    def cheap(self, c: Call) -> dict[str, str]:
        return {} if c.pre is None else {"y": "act"}

    def recompute(self, g: Recorder, c: Call, want: set[str]) -> dict[str, Tensor]:
        if "pre" in want or c.pre is None:
            return super().recompute(g, c, want)
        return {"y": g.emit(linear_act, c.pre, act=c.attrs["act"])}  # only the activation function runs again

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]

    def nbytes(self, c: Call) -> int:
        return super().nbytes(c) - (0 if c.pre_x is None else c.pre_x.nbytes)  # only backward reads it


class LinearAct(Op):
    """y = act(pre): recomputes y of a linear with an activation; follows a linear that something is added to."""

    name = "linear_act"
    ins = "pre:N,M"
    outs = "y:N,M"
    attrs = {"act": Act}
    saved = "pre"
    cpu = CpuKernel("linear_act", "y pre | N M act")
    cases = (
        case(N=7, M=33, act=Act.GELU_TANH),
        case(N=1, M=1, act=Act.GELU_TANH),
        *(case(N=21, M=56, act=act) for act in OTHERS),
        case(N=1024, M=3072, act=Act.GELU_TANH, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.act_forward(v.pre, v.act),)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"pre": g.emit(linear_act_backward, d["y"], c.pre, act=c.attrs["act"])}

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "act"}

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return rng.standard_normal(shape) if v["act"] is Act.RELU else None  # whose kink at 0 has no derivative

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches((_elementwise("linear_act_kernel", "y pre | N M", c, c.y.size, packs=ACT_PACKS),))


class LinearActBackward(Op):
    """dpre = dy * act'(pre)."""

    name = "linear_act_backward"
    ins = "dy:N,M pre:N,M"
    outs = "dpre:N,M"
    attrs = {"act": Act}
    cpu = CpuKernel("linear_act_backward", "dpre dy pre | N M act")
    cases = LinearAct.cases

    def ref(self, v: Any) -> tuple:
        return (reference.act_backward(v.dy, v.pre, v.act),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return Launches(
            (_elementwise("linear_act_backward_kernel", "dpre dy pre | N M", c, c.dy.size, packs=ACT_BACKWARD_PACKS),)
        )


class LinearBackwardW(Op):
    """dw += dy^T x;  db += sum of dy over rows. Without dw, x is absent."""

    name = "linear_backward_w"
    overlap = 1  # it has few tiles and leaves SMs idle, which the GEMM for dx uses
    ins = "dy:N,M x:N,K?"
    outs = "+dw:M,K:grad? +db:M:grad?"
    cpu = CpuKernel(
        "linear_backward_w",
        "dw db dy x scratch | N M K accumulate.dw accumulate.db threads",
        "linear_scratch N M K threads",
    )
    cases = (
        case(N=7, K=33, M=19),
        case(N=1, K=1, M=1),
        case(N=130, K=65, M=96),
        case(N=1100, K=16, M=264),
        case(N=40, K=24, M=48, without="db"),
        case(N=300, M=72, without="x dw"),
        case(N=1024, K=768, M=3072, real="gpt2-124m, B=4 T=256"),
        case(N=8192, K=768, M=2304, real="gpt2-124m, B=8 T=1024: tiles split along N on Hopper"),
        case(N=8200, K=1288, M=3848, real="more tiles than clusters, none of them full"),
    )

    def derive(self, d: dict[str, int]) -> None:
        d.setdefault("K", 1)  # without x; scratch is sized for one column

    def ref(self, v: Any) -> tuple:
        return reference.linear_backward_w(v.dy, v.x)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, M, K = (c.sizes[d] for d in "NMK")
        if c.dw is None:
            return Launches(*bias_gradient("dy", N, M, c.dtype, gpu))
        gemm = Gemm("dw", "dy", "x", M, K, N, ta=True, accumulate="accumulate.dw")
        if c.db is None:
            return Launches((gemm,))
        sums, scratch = bias_gradient("dy", N, M, c.dtype, gpu)
        separate = Launches((gemm, *sums), scratch)
        if N >= MIN_ROWS and wgmma_gemm.supports(gpu, c.dtype, M, K):
            return replace(weight_gradient(M, K, gpu), alternative=separate)
        return separate

    def flops(self, c: Call) -> int:
        return 0 if c.dw is None else 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]


class LinearBackwardX(Op):
    """dx = dx0 + dy w; with pre (x was act(pre)) the gradient of pre: dx = (dx0 + dy w) * act'(pre)."""

    name = "linear_backward_x"
    ins = "dy:N,M w:M,K pre:N,K? dx0:N,K?"
    outs = "dx:N,K"
    attrs = {"act": Act}
    cpu = CpuKernel("linear_backward_x", "dx dy w pre dx0 scratch | N M K act threads", "linear_scratch N M K threads")
    cases = (
        case(N=7, K=33, M=19, act=Act.NONE, without="pre dx0"),
        case(N=70, K=136, M=2072, act=Act.NONE, without="pre"),
        case(N=1, K=1, M=1, act=Act.GELU_TANH, without="dx0"),
        case(N=130, K=65, M=96, act=Act.GELU_TANH),
        case(N=67, K=96, M=64, act=Act.GELU_TANH, without="dx0"),
        *(case(N=9, K=40, M=24, act=act, without="dx0") for act in OTHERS),
        case(N=1024, K=768, M=3072, act=Act.NONE, without="pre dx0", real="gpt2-124m, B=4 T=256"),
        case(N=1024, K=3072, M=768, act=Act.GELU_TANH, without="dx0", real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        dx = reference.linear_backward_x(v.dy, v.w, v.dx0)
        return (dx if v.pre is None else reference.act_backward(dx, v.pre, v.act),)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, M, K = (c.sizes[d] for d in "NMK")
        gemm = Gemm("dx", "dy", "w", N, K, M, addend="" if c.dx0 is None else "dx0")
        if c.pre is None:
            return Launches((gemm,))
        separate = Launches(
            (gemm, _elementwise("linear_act_backward_kernel", "dx dx pre | N K", c, N * K, packs=ACT_BACKWARD_PACKS))
        )
        if not _fuses(c) or c.dx0 is not None:
            return separate
        fused = replace(gemm, epilogue="dgelu", aux="pre")
        return Launches((fused,), note="gelu' in the GEMM", alternative=separate)

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]


def bias_gradient(
    dy: str, N: int, M: int, dtype: DType, gpu: Gpu, accumulate: str = "accumulate.db", file: str = "cuda.cu"
) -> tuple[tuple[Kernel, Kernel], int]:
    """Launches for db = or += the sum of dy (N, M) over rows, and their bytes of scratch. lm_loss uses them, too.

    accumulate: a number word;  file: this folder's cuda.cu, as seen from the op's folder
    """
    vec = _vec(dtype, M)
    tiles = -(-M // (32 * vec))
    parts = max(1, min(4 * gpu.sms // tiles, -(-N // 8)))  # 4 blocks per SM; at least a row per warp
    partial = _kernel("linear_db_partial_kernel", f"scratch {dy} | {N} {M}", (tiles, parts, 1), vec=vec)
    db = _kernel("linear_db_kernel", f"db scratch | {M} {accumulate}", -(-M // 32), SUM_THREADS, parts=parts)
    return (replace(partial, file=file), replace(db, file=file)), 4 * parts * M


def weight_gradient(M: int, K: int, gpu: Gpu) -> Launches:
    """dw and db by our GEMM. A cluster computes a tile; tiles of a last round that is not full are split along N."""
    rows, columns, clusters = -(-M // wgmma_gemm.CLUSTER_M), -(-K // wgmma_gemm.TILE_N), wgmma_gemm.clusters(gpu)
    split = rows * columns % clusters
    if 20 * split > 17 * clusters:  # they nearly fill the round
        split = 0
    partials = (clusters + split) * wgmma_gemm.CLUSTER_M * wgmma_gemm.TILE_N
    row_sums = (rows * columns + clusters) * wgmma_gemm.CLUSTER_M
    gemm = wgmma_gemm.launch(
        "linear_weight_gradient_kernel",
        f"tma.dy tma.x dw scratch | M K N {split} accumulate.dw",
        gpu,
        "weight_gradient.cu",
        **WEIGHT_GRADIENT,
    )
    reduction = Kernel(
        "linear_weight_gradient_reduce_kernel",
        f"dw db scratch | M K N {clusters} {split} accumulate.dw accumulate.db",
        (4 * (split + rows), wgmma_gemm.TILE_N // 32, 1),
        WEIGHT_GRADIENT["REDUCE_THREADS"],
        defines=gemm.defines,
        file=gemm.file,
    )
    return Launches((gemm, reduction), scratch=4 * (partials + row_sums), note="db in our own GEMM")


def _vec(dtype: DType, *sizes: int) -> int:
    """Elements of a 16-byte access if that divides every size, else 1."""
    most = 16 // dtype.size
    return 1 if any(size % most for size in sizes) else most


def _fuses(c: Call) -> bool:
    """Whether cuBLASLt has an epilogue with the activation of this call: it has one for GELU's tanh form alone."""
    return c.attrs["act"] is Act.GELU_TANH and c.dtype is BF16 and _vec(c.dtype, c.sizes["M"], c.sizes["K"]) > 1


def _kernel(
    entry: str,
    args: str,
    grid: int | tuple[int, int, int],
    block: int = THREADS,
    vec: int = 1,
    parts: int = 1,
    act: Act = Act.NONE,
) -> Kernel:
    """A launch of cuda.cu."""
    return Kernel(entry, args, grid, block, defines=DEFINES | {"VEC": vec, "PARTS": parts, "ACT": act.value})


def _elementwise(entry: str, args: str, c: Call, n: int, packs: int) -> Kernel:
    """A launch of cuda.cu over n contiguous elements, `packs` accesses per thread."""
    vec = _vec(c.dtype, n)
    return _kernel(entry, args, -(-n // (THREADS * packs * vec)), vec=vec, act=c.attrs["act"])


linear, linear_act, linear_act_backward = Linear(), LinearAct(), LinearActBackward()
linear_backward_w, linear_backward_x = LinearBackwardW(), LinearBackwardX()
