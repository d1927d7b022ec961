"""embed: token and position embeddings. See README.md."""

from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.op import C, Op, case
from handgrad.core.program import Call, Program
from handgrad.core.tensor import Tensor
from handgrad.ops.embed import reference


class Embed(Op):
    """y = wte[ids] + wpe[n % T], in decode wpe[knobs.position + n % T]; without wpe only the first."""

    name = "embed"
    ins = "ids:N:i32 wte:V,C wpe:Tmax,C?"
    outs = "y:N,C"
    attrs = {"T": int, "decode": bool}
    saved = "ids"
    cpu = C("embed_forward", "y ids wte wpe | N C T decode knobs")
    cases = (
        case(N=6, C=33, V=11, Tmax=5, T=3, decode=False),
        case(N=1, C=1, V=1, Tmax=1, T=1, decode=False),
        case(N=14, C=40, V=5, Tmax=9, T=7, decode=True),
        case(N=1024, C=768, V=50304, Tmax=1024, T=256, decode=False, real="gpt2-124m, B=4 T=256"),
    )

    def derive(self, d: dict[str, int]) -> None:
        if d["N"] % d["T"]:
            raise HandgradError("embed", f"rows are whole sequences of {d['T']} tokens", d["N"])
        if d["T"] > d.get("Tmax", d["T"]):
            raise HandgradError("embed", f"wpe has a row for each of {d['T']} positions", d["Tmax"])

    def ref(self, v: Any) -> tuple:
        return (reference.embed_forward(v.ids, v.wte, v.wpe, v.T, int(v.knobs.position) if v.decode else 0),)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _ids(rng, shape, v) if arg.name == "ids" else None

    def backward(self, g: Program, c: Call, d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        into = {"dwte": g.grad(c.wte), "dwpe": None if c.wpe is None else g.grad(c.wpe)}
        Tmax = 0 if c.wpe is None else c.wpe.shape[0]
        g.emit(embed_backward, d["y"], c.ids, into=into, V=c.wte.shape[0], Tmax=Tmax, T=c.attrs["T"])
        return {}  # ids have no gradient


class EmbedBackward(Op):
    """dwte[ids[n]] += dy[n];  dwpe[n % T] += dy[n]."""

    name = "embed_backward"
    ins = "dy:N,C ids:N:i32"
    outs = "+dwte:V,C:f32 +dwpe:Tmax,C:f32?"
    attrs = {"V": int, "Tmax": int, "T": int}
    cpu = C("embed_backward", "dwte dwpe dy ids | N C V T Tmax acc.dwte acc.dwpe knobs")
    cases = (
        case(N=6, C=33, V=11, Tmax=5, T=3),
        case(N=1, C=1, V=1, Tmax=1, T=1),
        case(N=60, C=100, V=3, Tmax=20, T=20),
        case(N=1024, C=768, V=50304, Tmax=1024, T=256, real="gpt2-124m, B=4 T=256"),
    )

    def ref(self, v: Any) -> tuple:
        return reference.embed_backward(v.dy, v.ids, v.V, v.Tmax, v.T)

    def sample(self, rng: Any, arg: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        return _ids(rng, shape, v) if arg.name == "ids" else None


def _ids(rng: Any, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
    return rng.integers(0, v["V"], shape, dtype="int32")


embed, embed_backward = Embed(), EmbedBackward()
