"""attention: causal self-attention over packed q, k, v that never materialises T x T. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import C, Op, case
from handgrad.core.program import Call, Program
from handgrad.core.tensor import Tensor
from handgrad.ops.attention import reference


def _derive(d: dict[str, int]) -> None:
    if d["Q"] % (3 * d["H"]):
        raise HandgradError("attention", f"qkv is 3 x {d['H']} heads wide", d["Q"])
    if d["N"] % d["T"]:
        raise HandgradError("attention", f"rows are whole sequences of {d['T']} tokens", d["N"])
    d["D"], d["B"], d["C"] = d["Q"] // (3 * d["H"]), d["N"] // d["T"], d["Q"] // 3


class Attention(Op):
    """y = dropout(softmax(q k' / sqrt(D))) v for every head;  lse = logsumexp of the scores. p: dropout."""

    name = "attention"
    ins = "qkv:N,Q"
    outs = "y:N,C lse:B,H,T:f32"
    attrs = {"T": int, "H": int, "p": float, "stream": int}
    saved = "qkv y lse"
    cpu = C(
        "attention_forward", "y lse qkv | N T H D p stream knobs scratch", "attention_forward_scratch N T H D threads"
    )
    cases = (
        case(N=34, Q=48, T=17, H=2, p=0.0, stream=1),
        case(N=1, Q=3, T=1, H=1, p=0.0, stream=1),
        case(N=130, Q=99, T=65, H=1, p=0.25, stream=2),
        case(N=128, Q=384, T=64, H=4, p=0.0, stream=1),
        case(N=1024, Q=2304, T=256, H=12, p=0.0, stream=1, real="gpt2-124m, B=4 T=256"),
    )

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return reference.attention_forward(
            v.qkv, v.T, v.H, v.p, v.stream, v.knobs.seed, v.knobs.step, v.knobs.micro_step
        )

    def backward(self, g: Program, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {"qkv": g.emit(attention_backward, d["y"], c.qkv, c.y, c.lse, **c.attrs)}

    def flops(self, c: Call) -> int:
        return 2 * c.sizes["N"] * (c.sizes["T"] + 1) * c.sizes["C"]  # two products over the lower triangle


class AttentionBackward(Op):
    """dqkv from dy, with the probabilities computed again from lse."""

    name = "attention_backward"
    ins = "dy:N,C qkv:N,Q y:N,C lse:B,H,T:f32"
    outs = "dqkv:N,Q"
    attrs = Attention.attrs
    cpu = C(
        "attention_backward",
        "dqkv dy qkv y lse | N T H D p stream knobs scratch",
        "attention_backward_scratch N T H D threads",
    )
    cases = Attention.cases

    def derive(self, d: dict[str, int]) -> None:
        _derive(d)

    def ref(self, v: Any) -> tuple:
        return (
            reference.attention_backward(
                v.dy, v.qkv, v.y, v.lse, v.T, v.H, v.p, v.stream, v.knobs.seed, v.knobs.step, v.knobs.micro_step
            ),
        )

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        if arg.name in ("y", "lse"):  # what the forward leaves for this qkv, under the knobs of every check
            y, lse = reference.attention_forward(v["qkv"], v["T"], v["H"], v["p"], v["stream"], 7, 3, 0)
            return y if arg.name == "y" else lse
        return None

    def flops(self, c: Call) -> int:
        return 5 * c.sizes["N"] * (c.sizes["T"] + 1) * c.sizes["C"]


attention, attention_backward = Attention(), AttentionBackward()
