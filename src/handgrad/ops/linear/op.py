"""linear: y = x w^T + b, with GELU if asked, and its three gradient calls. See README.md."""

from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.op import C, Op, case
from handgrad.core.program import Call, Program
from handgrad.core.tensor import Tensor
from handgrad.ops.linear import reference


class Linear(Op):
    """y = x w^T + b; with gelu: pre = x w^T + b, y = gelu(pre). `keep_pre` stores pre for backward."""

    name = "linear"
    ins = "x:N,K w:M,K b:M?"
    outs = "y:N,M pre:N,M?"
    attrs = {"gelu": bool, "keep_pre": bool}
    saved = "x w pre"
    cpu = C("linear_forward", "y pre x w b | N M K gelu threads scratch", "linear_scratch N M K threads")
    cases = (
        case(N=7, K=33, M=19, gelu=False, keep_pre=False),
        case(N=1, K=1, M=1, gelu=True, keep_pre=True),
        case(N=65, K=96, M=130, gelu=True, keep_pre=True),
        case(N=1, K=64, M=257, gelu=False, keep_pre=False),
        case(N=1024, K=768, M=3072, gelu=True, keep_pre=True, real="gpt2-124m, B=4 T=256"),
        case(N=1024, K=3072, M=768, gelu=False, keep_pre=False, real="gpt2-124m, B=4 T=256"),
    )

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        return attrs["keep_pre"]

    def ref(self, v: Any) -> tuple:
        pre = v.round(reference.linear_forward(v.x, v.w, v.b))  # gelu reads what is kept: made again, it is the same
        return (reference.gelu(pre) if v.gelu else pre), pre

    def backward(self, g: Program, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        dy = d["y"]
        if c.attrs["gelu"]:
            dy = g.emit(linear_gelu_backward, dy, c.pre)
        into = {"dw": g.grad(c.w), "db": None if c.b is None else g.grad(c.b)}
        g.emit(linear_backward_w, dy, c.x, into=into)  # before dx: communication of dw can start early
        return {"x": g.emit(linear_backward_x, dy, c.w)}

    def remake(self, g: Program, c: Call, want: set[str]) -> dict[str, Tensor]:
        if "pre" in want or c.pre is None:
            return super().remake(g, c, want)
        return {"y": g.emit(linear_gelu, c.pre)}  # only the activation function again

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]


class LinearGelu(Op):
    """y = gelu(pre): recomputation of what a linear with gelu=True dropped."""

    name = "linear_gelu"
    ins = "pre:N,M"
    outs = "y:N,M"
    cpu = C("linear_gelu", "y pre | N M")
    cases = (case(N=7, M=33), case(N=1, M=1), case(N=1024, M=3072, real="gpt2-124m, B=4 T=256"))

    def ref(self, v: Any) -> tuple:
        return (reference.gelu(v.pre),)


class LinearGeluBackward(Op):
    """dpre = dy * gelu'(pre)."""

    name = "linear_gelu_backward"
    ins = "dy:N,M pre:N,M"
    outs = "dpre:N,M"
    cpu = C("linear_gelu_backward", "dpre dy pre | N M")
    cases = (case(N=7, M=33), case(N=1, M=1), case(N=1024, M=3072, real="gpt2-124m, B=4 T=256"))

    def ref(self, v: Any) -> tuple:
        return (reference.gelu_backward(v.dy, v.pre),)


class LinearBackwardW(Op):
    """dw += dy^T x;  db += sum of dy over rows."""

    name = "linear_backward_w"
    ins = "dy:N,M x:N,K"
    outs = "+dw:M,K:f32 +db:M:f32?"
    cpu = C(
        "linear_backward_w", "dw db dy x | N M K acc.dw acc.db threads knobs scratch", "linear_scratch N M K threads"
    )
    cases = (
        case(N=7, K=33, M=19),
        case(N=1, K=1, M=1),
        case(N=130, K=65, M=96),
        case(N=1024, K=768, M=3072, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.linear_backward_w(v.dy, v.x)

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]


class LinearBackwardX(Op):
    """dx = dy w."""

    name = "linear_backward_x"
    ins = "dy:N,M w:M,K"
    outs = "dx:N,K"
    cpu = C("linear_backward_x", "dx dy w | N M K threads scratch", "linear_scratch N M K threads")
    cases = (
        case(N=7, K=33, M=19),
        case(N=1, K=1, M=1),
        case(N=130, K=65, M=96),
        case(N=1024, K=768, M=3072, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return (reference.linear_backward_x(v.dy, v.w),)

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * c.sizes["M"] * c.sizes["K"]


linear, linear_gelu, linear_gelu_backward = Linear(), LinearGelu(), LinearGeluBackward()
linear_backward_w, linear_backward_x = LinearBackwardW(), LinearBackwardX()
