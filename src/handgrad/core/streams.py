"""Streams: which calls overlap later ones, and the call that waits for each.

A call whose op has an `overlap` of n may run on a second stream while the n calls after it run. The first of them that
reads or writes what it writes, or writes what it reads, waits for it.
"""

from handgrad.core.op import Call
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor

Span = tuple[object, int, int]  # a tensor or the name of a flat vector; first element; end


def joins(p: Program) -> list[int]:
    """For every call the index of the call that waits for it: the next one, unless the call overlaps."""
    return [_join(p, i) for i in range(len(p.calls))]


def _join(p: Program, i: int) -> int:
    early = p.calls[i]
    end = min(i + 1 + early.op.overlap, len(p.calls))
    return next((j for j in range(i + 1, end) if _conflict(p, early, p.calls[j])), end)


def _conflict(p: Program, early: Call, late: Call) -> bool:
    """Whether one of two calls writes what the other one reads or writes."""
    reads, writes = _spans(p, early.ins), _spans(p, early.outs)
    late_reads, late_writes = _spans(p, late.ins), _spans(p, late.outs)
    return _intersect(writes, late_reads + late_writes) or _intersect(reads, late_writes)


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
