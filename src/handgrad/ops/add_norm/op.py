"""add_norm: the pending residual add and the layer norm after it; norm: the same without an add. See README.md."""

from typing import Any

from handgrad.core.op import C, Op, case
from handgrad.core.program import Call, Program
from handgrad.core.tensor import Tensor
from handgrad.ops.add_norm import reference


class AddNorm(Op):
    """s = x + h;  y = (s - mean) * rstd * w + b."""

    name = "add_norm"
    ins = "x:N,C h:N,C w:C b:C"
    outs = "s:N,C y:N,C mean:N:f32 rstd:N:f32"
    attrs = {"eps": float}
    saved = "s w mean rstd"  # x and h are free after this call
    cpu = C("add_norm_forward", "s y mean rstd x h w b | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=1, C=1, eps=1e-5),
        case(N=64, C=128, eps=1e-5),
        case(N=1024, C=768, eps=1e-5, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        s = v.round(v.x + v.h)  # the norm reads what is kept: made again from it, y is the same
        return s, *reference.norm_forward(s, v.w, v.b, v.eps)

    def backward(self, g: Program, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        ds = _norm_backward(g, c, d["y"], d["s"], c.s)
        return {"x": ds, "h": ds}  # residual and branch share one gradient buffer

    def remake(self, g: Program, c: Call, want: set[str]) -> dict[str, Tensor]:
        if "s" in want:
            return super().remake(g, c, want)
        y, mean, rstd = g.emit(norm, c.s, c.w, c.b, **c.attrs)  # the add is not needed again
        return {"y": y, "mean": mean, "rstd": rstd}


class Norm(Op):
    """y = (x - mean) * rstd * w + b."""

    name = "norm"
    ins = "x:N,C w:C b:C"
    outs = "y:N,C mean:N:f32 rstd:N:f32"
    attrs = {"eps": float}
    saved = "x w mean rstd"
    cpu = C("norm_forward", "y mean rstd x w b | N C eps")
    cases = (
        case(N=7, C=33, eps=1e-5),
        case(N=1, C=1, eps=1e-5),
        case(N=1024, C=768, eps=1e-5, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.norm_forward(v.x, v.w, v.b, v.eps)

    def backward(self, g: Program, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"x": _norm_backward(g, c, d["y"], g.take(c.x), c.x)}  # x also feeds the residual: its gradient joins in


class NormBackward(Op):
    """dx = ds + d norm(dy);  dw += sum dy * n;  db += sum dy."""

    name = "norm_backward"
    ins = "dy:N,C ds:N,C? s:N,C w:C mean:N:f32 rstd:N:f32"
    outs = "dx:N,C +dw:C:f32 +db:C:f32"
    cpu = C(
        "norm_backward",
        "dx dw db dy ds s w mean rstd | N C acc.dw acc.db knobs scratch",
        "norm_backward_scratch N C threads",
    )
    cases = (case(N=7, C=33), case(N=1, C=1), case(N=300, C=64), case(N=1024, C=768, real="gpt2-124m, B=4 T=256"))

    def ref(self, v: Any) -> tuple:
        return reference.norm_backward(v.dy, v.ds, v.s, v.w, v.mean, v.rstd)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name in ("mean", "rstd"):  # those of s; eps 1, lest a single column amplify its roundings
            mean = v["s"].mean(-1)
            return mean if arg.name == "mean" else 1 / (((v["s"] - mean[:, None]) ** 2).mean(-1) + 1.0) ** 0.5
        return None


def _norm_backward(g: Program, c: Call, dy: Tensor, ds: Tensor | None, s: Tensor) -> Tensor:
    weight, bias = (c.ins[-2], c.ins[-1])
    return g.emit(norm_backward, dy, ds, s, weight, c.mean, c.rstd, into={"dw": g.grad(weight), "db": g.grad(bias)})


add_norm, norm, norm_backward = AddNorm(), Norm(), NormBackward()
