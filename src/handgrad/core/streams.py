"""Streams: which calls overlap later ones, and the call that waits for each.

A call with an overlap of n (`Call.overlap`, by default its op's) may run on another stream while the next n calls run.
The first of them that reads or writes what it writes, or writes what it reads, waits for it.
"""

from handgrad.core.program import Program
from handgrad.core.tensor import Tensor

Span = tuple[object, int, int]  # a tensor or the name of a flat vector; first element; end


def joins(p: Program) -> list[int]:
    """For every call the index of the call that waits for it: the next one, unless the call overlaps."""
    spans = [(_spans(p, c.ins), _spans(p, c.outs)) for c in p.calls]
    return [_join(p, spans, i) for i in range(len(p.calls))]


def _join(p: Program, spans: list[tuple[list[Span], list[Span]]], i: int) -> int:
    early, (reads, writes) = p.calls[i], spans[i]
    end = min(i + 1 + (early.op.overlap if early.overlap is None else early.overlap), len(p.calls))
    for j in range(i + 1, end):
        late_reads, late_writes = spans[j]
        if _intersect(writes, late_reads + late_writes) or _intersect(reads, late_writes):
            return j
    return end


def _spans(p: Program, tensors: tuple[Tensor | None, ...]) -> list[Span]:
    """The memory of tensors. Slices of one flat vector may overlap under different handles."""
    spans: list[Span] = []
    for t in tensors:
        if t in p.inside:
            base, start = p.inside[t]
            spans.append((base, start, start + t.size))
        elif t is not None and t.flat:
            start = p.element(t)
            spans.append((t.flat, start, start + t.size))
        elif t is not None:
            spans.append((t, 0, t.size))
    return spans


def _intersect(some: list[Span], others: list[Span]) -> bool:
    return any(a == b and i < k and j < end for a, i, end in some for b, j, k in others)
