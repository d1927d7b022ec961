"""lora: y = base + scale * u w^T, the upper half of low-rank adapters, and its gradient call. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, Case, CpuKernel, Op, Recorder, case
from handgrad.core.tensor import Tensor
from handgrad.launch import Gpu, Kernel, Launches
from handgrad.ops.lora import reference

THREADS = 256  # of a CUDA block
ROWS, DU_ROWS, DW_ROWS = 16, 8, 8  # rows that a block computes at a time: of y, of du; rows of u that it sums over
MOST_RANK = 256  # on a GPU: sums of dw are in registers
SPANS = ("at0", "n0", "at1", "n1", "at2", "n2")


def _derive(d: dict[str, int]) -> None:
    spans = [(d[f"at{p}"], d[f"n{p}"]) for p in range(3)]
    used = [(at, n) for at, n in spans if n]
    end = 0
    for at, n in used:
        if n < 0 or at < end or at + n > d["M"]:
            raise HandgradError("lora", f"spans are ascending columns of the {d['M']} of y", used)
        end = at + n
    if not used or used != spans[: len(used)]:
        raise HandgradError("lora", "the first of three spans are used", spans)
    if d["W"] != sum(n for _, n in used):
        raise HandgradError("lora", f"w has a row for each of {sum(n for _, n in used)} columns of the spans", d["W"])
    if d["U"] != d["R"] * len(used):
        raise HandgradError("lora", f"u has {d['R']} columns for each of {len(used)} spans", d["U"])


def _case(real: str = "", *, spans: tuple[int, ...] = (), **sizes: Any) -> Case:
    """A case with the spans (at, n, at, n, ...); none: all columns."""
    spans = spans or (0, sizes["M"])
    given: dict[str, Any] = dict(zip(SPANS, (*spans, *(0,) * (len(SPANS) - len(spans)))))
    U, W = sizes["R"] * len(spans[1::2]), sum(spans[1::2])
    return case(real, **given, **sizes, U=U, W=W, scale=0.5)


CASES = (
    _case(N=7, M=33, R=4),
    _case(N=1, M=1, R=1),
    _case(N=70, M=130, R=8),
    _case(N=33, M=96, R=16, spans=(0, 48, 48, 24, 72, 24)),
    _case(N=19, M=77, R=3, spans=(0, 40, 60, 17)),
    _case(N=40, M=72, R=70, spans=(24, 24, 48, 24)),
    _case(N=300, M=40, R=9, spans=(8, 16)),
    _case("llama-3.2-1b, q, k, v, B=1 T=256", N=256, M=3072, R=16, spans=(0, 2048, 2048, 512, 2560, 512)),
)


class Lora(Op):
    """y = base, and in each of at most three spans of its columns + scale * u w^T.

    Span p is the columns [at_p, at_p + n_p). It has R columns of u, and n_p rows of w, both in the order of the spans.
    """

    name = "lora"
    ins = "base:N,M u:N,U w:W,R"
    outs = "y:N,M"
    attrs = {"scale": float, "at0": int, "n0": int, "at1": int, "n1": int, "at2": int, "n2": int}
    params = "w"
    saved = "u w"
    cpu = CpuKernel(
        "lora_forward", "y base u w scratch | N M U W R at0 n0 at1 n1 at2 n2 scale", "lora_scratch W R threads"
    )
    cases = CASES

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return (reference.lora_forward(v),)

    def backward(self, g: Recorder, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        du = g.emit(lora_backward, d["y"], c.u, c.w, into={"dw": g.wanted_grad(c.w)}, **c.attrs)
        assert d["y"] is not None
        return {"base": d["y"], "u": du}

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["W"] * c.sizes["R"]

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        grid = (-(-c.sizes["M"] // THREADS), -(-c.sizes["N"] // ROWS), 1)
        return Launches((Kernel("lora_forward_kernel", "y base u w | N", grid, THREADS, 0, _defines(c)),))


class LoraBackward(Op):
    """du = scale * dy w and dw += scale * dy^T u, span by span. base has the gradient dy."""

    name = "lora_backward"
    ins = "dy:N,M u:N,U w:W,R"
    outs = "du:N,U +dw:W,R:grad?"
    attrs = Lora.attrs
    cpu = CpuKernel(
        "lora_backward",
        "du dw dy u w scratch | N M U W R at0 n0 at1 n1 at2 n2 scale accumulate.dw",
        "lora_scratch W R threads",
    )
    cases = CASES

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return reference.lora_backward(v)

    def flops(self, c: Call) -> int:
        return (2 if c.dw is None else 4) * c.sizes["N"] * c.sizes["W"] * c.sizes["R"]

    def cuda(self, c: Call, gpu: Gpu) -> Launches:
        N, W, R, d = c.sizes["N"], c.sizes["W"], c.sizes["R"], _defines(c)
        du = Kernel("lora_du_kernel", "du dy w | N", (-(-N // DU_ROWS), c.sizes["U"] // R, 1), THREADS, 0, d)
        if c.dw is None:
            return Launches((du,))
        tiles = -(-W // 32)
        parts = max(1, min(4 * gpu.sms // tiles, -(-N // (4 * DW_ROWS))))
        partial = Kernel("lora_dw_partial_kernel", "scratch dy u | N", (tiles, parts, 1), THREADS, 0, d)
        grid = -(-W * R // THREADS)
        dw = Kernel("lora_dw_kernel", f"dw scratch | {parts} accumulate.dw", grid, THREADS, 0, d)
        return Launches((du, partial, dw), scratch=4 * parts * W * R)


def _defines(c: Call) -> dict[str, Any]:
    d = c.sizes
    if d["R"] > MOST_RANK:
        raise HandgradError("lora", f"cuda kernels take a rank of at most {MOST_RANK}", d["R"])
    group = min(64, 1 << (d["R"] - 1).bit_length())  # threads of lora_du_kernel that share a row of w
    sizes = {"COLUMNS": d["M"], "U_COLUMNS": d["U"], "W_ROWS": d["W"], "RANK": d["R"], "GROUP": group}
    spans = {name.upper(): d[name] for name in SPANS}
    rows = {"THREADS": THREADS, "ROWS": ROWS, "DU_ROWS": DU_ROWS, "DW_ROWS": DW_ROWS}
    return sizes | spans | rows | {"SCALE": c.attrs["scale"]}


lora, lora_backward = Lora(), LoraBackward()
