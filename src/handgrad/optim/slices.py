"""The slices that an update writes, by the names that update ops have for them; sizes of whole parameters."""

from collections.abc import Iterator

from handgrad.core.dtypes import F32, I16
from handgrad.core.errors import HandgradError
from handgrad.core.params import Bucket, Param
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.ops import rms

LEAST_RMS = 1e-3  # of a parameter that scales its own step: one that starts at zero would never move
Slices = dict[str, Tensor | None]


def declare_low(g: Program) -> None:
    """Declares the low halves of bf16 weights, unless updates round stochastically."""
    if g.dtype is not F32 and g.master:
        g.flat("low", I16)


def slices(g: Program, bucket: Bucket) -> Slices:
    """`p`, and the slice of every vector of the optimizer that covers the bucket, by the vector's name."""
    state = {name: v for name, v in g.vectors.items() if name not in ("param", "grad")}
    found: Slices = {name: g.slice(name, bucket) for name, v in state.items() if bucket in v.buckets}
    return {"p": g.slice("param", bucket)} | found


def whole_parameters(g: Program, bucket: Bucket, what: str) -> Iterator[tuple[Param, int, Tensor, Slices]]:
    """Of every parameter of a bucket: it, its first element in the flat order, its gradient (n) and its `slices` (n).

    Raises HandgradError where ranks hold shares of parameters.
    """
    if g.ranks.shares(1) > 1:
        raise HandgradError(
            "optim", f"{what} needs whole parameters on each rank", f"zero {g.ranks.zero}", hint="--zero 0"
        )
    grad, held = g.slice("grad", bucket), slices(g, bucket)
    for param, (tensor, place) in zip(bucket.members, bucket.places()):
        own = {name: t and g.within(t, place, tensor.size) for name, t in held.items()}
        yield param, bucket.start + place, g.within(grad, place, tensor.size), own


def size_of(g: Program, param: Param, own: Slices) -> Tensor:
    """Appends the call that measures a parameter's RMS, at least LEAST_RMS; returns its result."""
    result: Tensor = g.emit(rms, own["p"], own.get("low"), count=param.size, least=LEAST_RMS)
    return result
