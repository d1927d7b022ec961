"""add_norm: the pending residual add and the layer norm after it; norm: the layer norm alone. See README.md.

add_rms_norm and rms_norm: the same with the RMS norm, by the same kernels.
"""

from typing import Any

from handgrad.core.op import Call, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.add_norm import reference

SUM_THREADS = 1024  # of a CUDA block that adds partial sums


class AddNorm(Op):
    """s = x + h + hb;  y = (s - mean) * rstd * w + b.  hb is the bias of the linear at the end of branch h."""

    name = "add_norm"
    ins = "x:N,C h:N,C w:C b:C hb:C?"
    outs = "s:N,C y:N,C mean:N:f32 rstd:N:f32"
    attrs = {"eps": float}
    params = "w b hb"
    saved = "s w mean rstd"  # not x and h: backward needs only their sum
    differentiated = "s y"
    cpu = CpuKernel("add_norm_forward", "s y mean rstd x h w b hb | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=7, C=33, eps=1e-5, without="hb"),
        case(N=1, C=1, eps=1e-5),
        case(N=64, C=128, eps=1e-5),
        case(N=64, C=128, eps=1e-5, without="hb"),
        case(N=6, C=1600, eps=1e-5),
        case(N=5, C=2072, eps=1e-5),
        case(N=3, C=1037, eps=1e-5, without="hb"),
        case(N=1024, C=768, eps=1e-5, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        h = v.h if v.hb is None else v.h + v.hb
        s = v.round(v.x + h)  # the norm reads the stored value, so recomputing y from it gives the same bits
        return s, *reference.norm_forward(s, v.w, v.b, v.eps)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _forward(c, "add_norm_forward_kernel", "s y mean rstd x h w b hb | N eps")

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        ds = _backward_call(g, c, norm_backward, d["y"], d["s"], c.s, c.hb, c.x, c.h)
        return {"x": ds, "h": ds}  # residual and branch share one gradient buffer

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "norm"}

    def recompute(self, g: Recorder, c: Call, want: set[str]) -> dict[str, Tensor]:
        if "s" in want:
            return super().recompute(g, c, want)
        y, mean, rstd = g.emit(norm, c.s, c.w, c.b, **c.attrs)  # s is kept, so only the norm runs again
        return {"y": y, "mean": mean, "rstd": rstd}


class Norm(Op):
    """y = (x - mean) * rstd * w + b."""

    name = "norm"
    ins = "x:N,C w:C b:C"
    outs = "y:N,C mean:N:f32 rstd:N:f32"
    attrs = {"eps": float}
    params = "w b"
    saved = "x w mean rstd"
    cpu = CpuKernel("norm_forward", "y mean rstd x w b | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=1, C=1, eps=1e-5),
        case(N=6, C=1600, eps=1e-5),
        case(N=1024, C=768, eps=1e-5, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.norm_forward(v.x, v.w, v.b, v.eps)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _forward(c, "norm_forward_kernel", "y mean rstd x w b | N eps")

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "norm"}

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        ds = g.take(c.x)  # x also feeds the residual: the kernel adds the gradient from there
        return {"x": _backward_call(g, c, norm_backward, d["y"], ds, c.x, None, c.x)}


class NormBackward(Op):
    """dx = ds + d norm(dy);  dw += sum dy * n;  db += sum dy;  dhb += sum dx."""

    name = "norm_backward"
    ins = "dy:N,C ds:N,C? s:N,C w:C mean:N:f32 rstd:N:f32"
    outs = "dx:N,C? +dw:C:grad? +db:C:grad? +dhb:C:grad?"
    cpu = CpuKernel(
        "norm_backward",
        "dx dw db dhb dy ds s w mean rstd scratch | N C accumulate.dw accumulate.db accumulate.dhb",
        "norm_backward_scratch N C threads",
    )
    cases = (
        case(N=7, C=33),
        case(N=1, C=1),
        case(N=300, C=64),
        case(N=41, C=1600),
        case(N=9, C=40, without="ds"),
        case(N=41, C=48, without="dhb"),
        case(N=9, C=33, without="ds dhb"),
        case(N=5, C=2072),
        case(N=5, C=2072, without="dhb"),
        case(N=300, C=256, without="dw db dhb"),
        case(N=5, C=2072, without="dw db"),
        case(N=41, C=48, without="dx ds dw"),
        case(N=300, C=256),
        case(N=3, C=1037),
        case(N=1024, C=768, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.norm_backward(v.dy, v.ds, v.s, v.w, v.mean, v.rstd)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        args = "dx {} dy ds s w mean rstd | N", "dw db dhb scratch | accumulate.dw accumulate.db accumulate.dhb"
        return _backward(c, gpu, *args, rms=False)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name in ("mean", "rstd"):  # of s; eps is 1, so that a single column does not amplify rounding
            mean = v["s"].mean(-1)
            return mean if arg.name == "mean" else 1 / (((v["s"] - mean[:, None]) ** 2).mean(-1) + 1.0) ** 0.5
        return None


class AddRmsNorm(Op):
    """s = x + h + hb;  y = s * rstd * w.  hb is the bias of the linear at the end of branch h."""

    name = "add_rms_norm"
    ins = "x:N,C h:N,C w:C hb:C?"
    outs = "s:N,C y:N,C rstd:N:f32"
    attrs = {"eps": float}
    params = "w hb"
    saved = "s w rstd"
    differentiated = "s y"
    cpu = CpuKernel("add_rms_norm_forward", "s y rstd x h w hb | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=7, C=33, eps=1e-5, without="hb"),
        case(N=1, C=1, eps=1e-6),
        case(N=64, C=128, eps=1e-5, without="hb"),
        case(N=4, C=2048, eps=1e-6),
        case(N=3, C=4096, eps=1e-6, without="hb"),
        case(N=3, C=1037, eps=1e-6, without="hb"),
        case(N=1024, C=2048, eps=1e-5, without="hb", real="llama-3.2-1b, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        s = v.round(v.x + (v.h if v.hb is None else v.h + v.hb))  # as in AddNorm
        return s, *reference.rms_norm_forward(s, v.w, v.eps)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _forward(c, "add_norm_forward_kernel", "s y null rstd x h w null hb | N eps", rms=True)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        ds = _backward_call(g, c, rms_norm_backward, d["y"], d["s"], c.s, c.hb, c.x, c.h)
        return {"x": ds, "h": ds}

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "norm"}

    def recompute(self, g: Recorder, c: Call, want: set[str]) -> dict[str, Tensor]:
        if "s" in want:
            return super().recompute(g, c, want)
        y, rstd = g.emit(rms_norm, c.s, c.w, **c.attrs)
        return {"y": y, "rstd": rstd}


class RmsNorm(Op):
    """y = x * rstd * w."""

    name = "rms_norm"
    ins = "x:N,C w:C"
    outs = "y:N,C rstd:N:f32"
    attrs = {"eps": float}
    params = "w"
    saved = "x w rstd"
    cpu = CpuKernel("rms_norm_forward", "y rstd x w | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=1, C=1, eps=1e-6),
        case(N=4, C=2048, eps=1e-6),
        case(N=3, C=4096, eps=1e-6),
        case(N=1024, C=2048, eps=1e-5, real="llama-3.2-1b, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.rms_norm_forward(v.x, v.w, v.eps)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        return _forward(c, "norm_forward_kernel", "y null rstd x w null | N eps", rms=True)

    def cheap(self, c: Call) -> dict[str, str]:
        return {"y": "norm"}

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        ds = g.take(c.x)  # as in Norm
        return {"x": _backward_call(g, c, rms_norm_backward, d["y"], ds, c.x, None, c.x)}


class RmsNormBackward(Op):
    """dx = ds + d rms_norm(dy);  dw += sum dy * n;  dhb += sum dx."""

    name = "rms_norm_backward"
    ins = "dy:N,C ds:N,C? s:N,C w:C rstd:N:f32"
    outs = "dx:N,C? +dw:C:grad? +dhb:C:grad?"
    cpu = CpuKernel(
        "rms_norm_backward",
        "dx dw dhb dy ds s w rstd scratch | N C accumulate.dw accumulate.dhb",
        "rms_norm_backward_scratch N C threads",
    )
    cases = (
        case(N=7, C=33),
        case(N=1, C=1),
        case(N=300, C=64, without="dhb"),
        case(N=9, C=40, without="ds"),
        case(N=41, C=48),
        case(N=9, C=33, without="ds dhb"),
        case(N=300, C=768, without="dhb"),
        case(N=300, C=768, without="dw dhb"),
        case(N=5, C=4096, without="dw"),
        case(N=41, C=48, without="dx ds dhb"),
        case(N=41, C=1600),
        case(N=5, C=2048, without="dhb"),
        case(N=5, C=4096),
        case(N=3, C=1037, without="dhb"),
        case(N=1024, C=2048, without="dhb", real="llama-3.2-1b, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.rms_norm_backward(v.dy, v.ds, v.s, v.w, v.rstd)

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        args = "dx {} dy ds s w null rstd | N", "dw null dhb scratch | accumulate.dw 0 accumulate.dhb"
        return _backward(c, gpu, *args, rms=True)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return 1 / ((v["s"] ** 2).mean(-1) + 1.0) ** 0.5 if arg.name == "rstd" else None  # as in NormBackward


def _layout(c: Call, packs: int) -> dict[str, int]:
    """How threads divide rows: a warp per row if a thread then has at most `packs` accesses, else a block per row."""
    vec = 16 // c.dtype.size
    vec = vec if c.sizes["C"] % vec == 0 else 1
    accesses = -(-c.sizes["C"] // vec)
    row_threads = 32 if accesses <= 32 * packs else min(1024, -(-accesses // 64) * 32)
    return {"COLUMNS": c.sizes["C"], "VEC": vec, "ROW_THREADS": row_threads, "ROWS": 4 if row_threads == 32 else 1}


def _forward(c: Call, entry: str, args: str, *, rms: bool = False) -> Launches:
    defines = _layout(c, packs=8) | {"FORWARD": 1, "BIAS": int(getattr(c, "hb", None) is not None), "RMS": int(rms)}
    rows = defines["ROWS"]
    return Launches((Kernel(entry, args, -(-c.sizes["N"] // rows), defines["ROW_THREADS"] * rows, 0, defines),))


def _backward(c: Call, gpu: Gpu, args: str, sum_args: str, *, rms: bool) -> Launches:
    """norm_backward_kernel and, if something learns, norm_backward_sum_kernel, with these arguments.

    {} in `args` is where partial sums go
    """
    N, C, size = c.sizes["N"], c.sizes["C"], c.dtype.size
    weights = c.dw is not None or (not rms and c.db is not None)
    streams, sums = 2 + (c.ds is not None), weights * (1 if rms else 2) + (c.dhb is not None)
    d = _layout(c, packs=7)
    staging, summing = 2 * streams * C * size, sums * C * 4  # bytes per concurrent row: two rows per stream; sums
    staged = d["VEC"] > 1 and C * size + staging <= gpu.shared_bytes
    if d["ROW_THREADS"] == 32:  # one block per SM, of as many warps as registers and shared memory allow
        blocks_per_sm = 1
        own = sums * -(-C // (32 * d["VEC"])) * d["VEC"]  # float sums in the registers of a thread
        rows = 24 if own <= 24 else 16 if own <= 48 else 12 if own <= 96 else 8
        rows = max(1, min(rows, (gpu.shared_bytes - C * size) // max(staging * staged, summing, 1), -(-N // gpu.sms)))
        rows = rows if rows < 4 else rows // 4 * 4  # an SM has four partitions with registers of their own
        d["ROWS"] = rows
    else:
        rows, blocks_per_sm = 1, max(1, 512 // d["ROW_THREADS"])
    shared = max((C * size + rows * staging) * staged, rows * summing * (rows > 1))
    fit = (gpu.shared_bytes + 1024) // (shared + 1024)  # the hardware reserves 1 KiB per block
    blocks_per_sm = max(1, min(blocks_per_sm, fit))
    blocks = min(-(-N // rows), gpu.sms * blocks_per_sm)
    d |= {"SUMS": sums, "STREAMS": streams, "STAGED": int(staged), "BLOCKS_PER_SM": blocks_per_sm}
    d |= {"BLOCKS": blocks, "FORWARD": 0, "RMS": int(rms), "SUM_THREADS": SUM_THREADS}
    d |= {"WEIGHTS": int(weights), "DX": int(c.dx is not None)}
    args = args.format("scratch" if sums else "null")
    kernel = Kernel("norm_backward_kernel", args, blocks, d["ROW_THREADS"] * rows, shared, d)
    if not sums:
        return Launches((kernel,))
    add = Kernel("norm_backward_sum_kernel", sum_args, -(-sums * C // 32), SUM_THREADS, 0, d)
    return Launches((kernel, add), scratch=blocks * summing)


def _backward_call(
    g: Recorder, c: Call, op: Op, dy: Tensor | None, ds: Tensor | None, s: Tensor, hb: Tensor | None, *below: Tensor
) -> Any:
    """Appends `op`, the gradient of the norm of s; returns dx, None if none of `below`, which s is made of, wants it.

    ds: the gradient that reaches s past the norm;  hb: a bias added into s
    """
    params = {"dw": c.w, "db": getattr(c, "b", None), "dhb": hb}
    into = {arg.name: g.wanted_grad(params[arg.name]) for arg in op.out_args if arg.inout}
    without = () if any(map(g.wants, below)) else ("dx",)
    statistics = [getattr(c, arg.name) for arg in op.in_args if arg.name in ("mean", "rstd")]
    reaches = not without or into["dhb"] is not None
    return g.emit(op, dy, ds if reaches else None, s, c.w, *statistics, into=into, without=without)


add_norm, norm, norm_backward = AddNorm(), Norm(), NormBackward()
add_rms_norm, rms_norm, rms_norm_backward = AddRmsNorm(), RmsNorm(), RmsNormBackward()
