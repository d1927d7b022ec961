"""Shards: whole parameters and optimizer state from what ranks hold of them, for checkpoints and for who looks at them.

A checkpoint knows nothing of ranks: it holds every parameter whole, so that any number of them can resume from it.
"""

from collections.abc import Iterator

import numpy as np

from handgrad.backends.base import Arena
from handgrad.backends.ranks.comm import Comm
from handgrad.core.program import STATE, Program

PARAM, GRAD = "param", "grad"
Expected = dict[str, tuple[tuple[int, ...], np.dtype]]


def whole(arena: Arena, comm: Comm, p: Program, vector: str) -> Iterator[tuple[str, np.ndarray]]:
    """The parts of a flat vector by the names of the parameters that it covers.

    Where ranks hold shares, all of them call this, a parameter is gathered at a time, and only rank 0 gets arrays; they
    are copies. Elsewhere they are, on the host, views.
    """
    v = p.vectors[vector]
    shares = max(v.shares, p.ranks.shares(1) if vector == GRAD else 1)  # ZeRO 1 sums only the own share of a gradient
    for name, info in p.params.items():
        if not v.covers(info.tensor):
            continue
        part = arena.read_part(vector, info.tensor)
        if shares == 1:
            yield name, part
            continue
        _, low, high = v.piece(info.tensor, shares)
        own = part.reshape(-1)
        pieces = comm.gather(own if own.size == high - low else own[low:high])
        if comm.rank == 0:
            yield name, np.concatenate(pieces).reshape(v.shape(info.tensor))


def state(arena: Arena, comm: Comm, p: Program) -> dict[str, np.ndarray]:
    """What a resume needs besides weights: every vector of the optimizer as <vector>.<parameter>, such as
    m.wte.weight, and every state of the program as state.<name>."""
    vectors = [name for name in p.vectors if name not in (PARAM, GRAD)]
    found = {f"{v}.{name}": a for v in vectors for name, a in whole(arena, comm, p, v)}
    return found | {f"{STATE}.{name}": arena.read(t) for name, t in p.states.items()}


def expected(arena: Arena, p: Program, vectors: list[str], prefix: bool) -> Expected:
    """Names, shapes and types of what a checkpoint holds of these vectors; `prefix`: with the vector's name."""
    return {
        f"{v}.{name}" if prefix else name: (p.vectors[v].shape(info.tensor), arena.read_part(v, info.tensor).dtype)
        for v in vectors
        for name, info in p.params.items()
        if p.vectors[v].covers(info.tensor)
    }


def expected_state(arena: Arena, p: Program) -> Expected:
    """Names, shapes and types of `state`."""
    found = expected(arena, p, [name for name in p.vectors if name not in (PARAM, GRAD)], prefix=True)
    states = {f"{STATE}.{name}": arena.read(t) for name, t in p.states.items()}
    return found | {name: (a.shape, a.dtype) for name, a in states.items()}
