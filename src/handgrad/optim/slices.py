"""What one rank updates of a bucket: slices, by the names that update ops have for them, and a piece of each parameter.
And what ranks send each other where an update needs whole parameters: values of a bucket, sizes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from handgrad.core.dtypes import F32, I16
from handgrad.core.op import Phase
from handgrad.core.params import Bucket, Param
from handgrad.core.program import Program
from handgrad.core.tensor import Role, Tensor
from handgrad.ops import rms, rms_of_ranks
from handgrad.ops.collectives import all_gather, all_gather_f32

LEAST_RMS = 1e-3  # of a parameter that scales its own step: one that starts at zero would never move
Slices = dict[str, Tensor | None]


@dataclass(frozen=True)
class Piece:
    """The elements of a parameter that this rank updates: all of them, or those in its share, maybe none. Of one that
    stacks several matrices (`Param.parts`: q, k and v) each is a parameter of its own.

    name   of the parameter, with the number of the matrix
    shape  of the whole; count: its elements that are no padding
    place  where it starts in its bucket
    first  its first element here
    start  the place of that element in the flat order of all parameters
    into   `slices` of these elements
    grad   their gradients
    """

    name: str
    shape: tuple[int, ...]
    count: int
    place: int
    first: int
    start: int
    into: Slices
    grad: Tensor


def declare_low(g: Program) -> None:
    """Declares the low halves of bf16 weights, unless updates round stochastically."""
    if g.dtype is not F32 and g.master:
        g.flat("low", I16)


def slices(g: Program, bucket: Bucket) -> Slices:
    """`p`, and the slice of every vector of the optimizer that covers the bucket, by the vector's name."""
    state = {name: v for name, v in g.vectors.items() if name not in ("param", "grad")}
    found: Slices = {name: g.slice(name, bucket) for name, v in state.items() if bucket in v.buckets}
    return {"p": g.slice("param", bucket)} | found


def pieces(g: Program, bucket: Bucket) -> list[Piece]:
    """The pieces of every parameter of a bucket."""
    grad, held, share = g.slice("grad", bucket), slices(g, bucket), g.share_start(bucket)
    found = []
    for param, (tensor, place) in zip(bucket.members, bucket.places()):
        _, low, high = g.vectors["param"].piece(tensor, g.ranks.shares(1))
        for name, shape, begin in _matrices(param):
            end = begin + math.prod(shape)
            first, last = max(low, begin), min(high, end)
            start = bucket.start + place + first if first < last else share
            span = start - share, max(last - first, 0)
            into = {key: t and g.within(t, *span) for key, t in held.items()}
            count = param.size if shape == tensor.shape else end - begin
            found.append(Piece(name, shape, count, place + begin, first - begin, start, into, g.within(grad, *span)))
    return found


def _matrices(param: Param) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yields (name, shape, first element) of each matrix that a parameter stacks; of the whole parameter, if it stacks
    none or a size is no multiple of the four elements that kernels load at once."""
    name, shape, row = param.tensor.name, param.tensor.shape, 0
    if len(param.parts) < 2 or any(rows * shape[1] % 4 for rows, _ in param.parts):
        yield name, shape, 0
        return
    for k, (rows, _) in enumerate(param.parts):
        yield f"{name}.{k}", (rows, shape[1]), row * shape[1]
        row += rows


def gather(g: Program, bucket: Bucket, share: Tensor) -> Tensor:
    """A whole bucket of values of which every rank has its share: an activation that ranks send each other, or, of one
    rank, the share itself."""
    if share.size == bucket.size:
        return share
    whole = Tensor(f"{share.name}.gathered", (bucket.size,), share.dtype, Role.ACT)
    _exchange(g, share, whole)
    return whole


def sizes_of(g: Program, bucket: Bucket, found: list[Piece]) -> list[Tensor]:
    """Appends the calls that measure the RMS of every parameter, at least LEAST_RMS; returns their results. Ranks that
    hold pieces send each other a number for each."""
    world, count = g.ranks.shares(1), len(found)
    sizes = Tensor(f"{bucket.name}.rms", (world * count,), F32, Role.ACT)
    begin = g.ranks.rank * count if world > 1 else 0
    for k, piece in enumerate(found):
        y, least = g.within(sizes, begin + k, 1), LEAST_RMS if world == 1 else 0.0
        g.emit(rms, piece.into["p"], piece.into.get("low"), into={"y": y}, count=piece.count, least=least)
    if world > 1:
        _exchange(g, g.within(sizes, begin, count), sizes)
        each = g.part_of(sizes, 0, f"{sizes.name} of ranks", (world, count), Role.ACT)
        sizes = g.emit(rms_of_ranks, each, least=LEAST_RMS)
    return [g.within(sizes, k, 1) for k in range(count)]


def _exchange(g: Program, share: Tensor, whole: Tensor) -> None:
    """Appends the call that gathers shares."""
    outer, g.phase = g.phase, Phase.COMMUNICATE
    g.emit(all_gather_f32 if share.dtype is F32 else all_gather, share, into={"full": whole})
    g.phase = outer
