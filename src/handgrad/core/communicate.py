"""communicate: edits the list so that several ranks train one model. The third function that derives calls, after
`backward` and before the optimizer's record.

Each rank runs the same list on its own micro-batches. Gradients are summed over ranks, bucket by bucket, as soon as the
last call has written a bucket; what a ZeRO stage shards (ranks.py) is gathered before it is read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from handgrad.core.dtypes import F32
from handgrad.core.op import Call, Op, Phase, When
from handgrad.core.params import Bucket
from handgrad.core.program import Program
from handgrad.core.streams import joins
from handgrad.core.tensor import Role, Tensor

Use = tuple[int, Tensor]  # the index of a call in the list, and the parameter or gradient that it uses
Places = dict[Tensor | None, tuple[Bucket, int]]  # the bucket of a tensor, and its first element there
Edits = dict[int, list[tuple[Bucket, Callable[[], None]]]]  # what is recorded for a bucket before the call of an index


@dataclass(frozen=True)
class Collectives:
    """The ops that the edits use: core knows none by name.

    all_reduce      +x, the sum over ranks
    reduce_scatter  full -> +share, this rank's part of the sum
    all_gather      share -> +full
    all_gather_f32  the same for float32 values, whatever the working dtype
    sum_losses      +scalars, their loss_sum summed over ranks
    share_norm      x -> +y, the L2 norm of this rank's gradients of a bucket
    fill            +x with one value
    """

    all_reduce: Op
    reduce_scatter: Op
    all_gather: Op
    all_gather_f32: Op
    sum_losses: Op
    share_norm: Op
    fill: Op


def communicate(p: Program, ops: Collectives) -> None:
    """Inserts what ranks exchange in forward and backward into a training program that has its backward, and in which
    every gradient is written. Changes nothing for one rank."""
    if p.ranks.world == 1:
        return
    if p.ranks.zero >= 3:
        gather_parameters(p, p, ops.all_gather)
    if p.ranks.zero >= 2:
        _shard_gradients(p, ops)
    else:
        _reduce_gradients(p, ops)
    sum_losses(p, ops.sum_losses)


def gather_parameters(p: Program, primary: Program, all_gather: Op) -> None:
    """Has a program gather the parameters that ranks hold shares of, a bucket at a time: before the first call of a
    span of blocks that reads it, or a block earlier where collectives overlap, into an activation that ends with the
    last one.

    primary: the program that lays out the parameters
    """
    known = {t.name: (bucket, place) for bucket in primary.buckets for t, place in bucket.places()}
    mine: Places = {info.tensor: known[name] for name, info in p.params.items()}
    edits: Edits = defaultdict(list)
    runs = _runs(p)
    for bucket, uses in _spans(p, mine, lambda c: c.ins):
        at = uses[0][0]
        if primary.ranks.overlaps:
            at = runs.index(max(runs[at] - 1, 0))
        base = Tensor(f"{bucket.name}.gathered", (bucket.size,), primary.dtype, Role.ACT)
        parts = {t: p.part_of(base, mine[t][1], t.name, t.shape, Role.PARAM) for t in _distinct(uses)}
        for i, _ in uses:
            p.calls[i].ins = tuple(parts.get(t, t) if t is not None else None for t in p.calls[i].ins)
        share = primary.slice("param", bucket)
        p.starts[share] = primary.element(share)
        record = partial(p.emit, all_gather, share, into={"full": base})
        edits[at].append((bucket, record))
    _insert(p, edits)


def publish(p: Program, primary: Program, bucket: Bucket, all_gather: Op) -> None:
    """Records that ranks send each other the shares of a bucket's parameters that they have written, where every rank
    holds all of them.

    primary: the program that lays out the parameters
    """
    if p.ranks.shares(1) > p.ranks.shares(3):
        outer, p.phase = p.phase, Phase.COMMUNICATE
        p.emit(all_gather, primary.slice("param", bucket), into={"full": primary.bucket("param", bucket)})
        p.phase = outer


def sum_losses(p: Program, op: Op) -> None:
    """Records that the losses of all ranks are added up, once a step."""
    outer, p.phase, p.when = (p.phase, p.when), Phase.COMMUNICATE, When.LAST
    p.emit(op, into={"scalars": p.scalars})
    p.phase, p.when = outer


def record_norm(p: Program, ops: Collectives, global_norm: Op, clip: float) -> None:
    """Records the norm of all gradients and the clip factor, from the norm of each bucket's share on each rank. The
    norm of the norms is that of all: they are numbers whose squares neither overflow nor depend on a rank."""
    count, ranks = len(p.trained), p.ranks
    norms = Tensor("norms", (ranks.world * count,), F32, Role.ACT)
    for k, bucket in enumerate(p.trained):
        y = p.part_of(norms, ranks.rank * count + k, f"{bucket.name}.norm", (1,), Role.ACT)
        p.emit(ops.share_norm, p.slice("grad", bucket), into={"y": y})
    mine = p.part_of(norms, ranks.rank * count, "own norms", (count,), Role.ACT)
    outer, p.phase = p.phase, Phase.COMMUNICATE
    p.emit(ops.all_gather_f32, mine, into={"full": norms})
    p.phase = outer
    p.emit(global_norm, norms, into={"scalars": p.scalars}, clip=clip)


def _reduce_gradients(p: Program, ops: Collectives) -> None:
    """ZeRO 0 and 1: in the last micro-batch, sums each bucket after its last writer; for 1, only into the own share.

    A writer that overlaps later calls is waited for first, so that the sum does not cut the overlap short.
    """
    of, ends = _gradients(p), joins(p)
    last: dict[Bucket, int] = {}
    for i, c in enumerate(p.calls):
        for t in c.outs:
            if t in of:
                last[of[t][0]] = max(last.get(of[t][0], 0), ends[i])

    def reduce(bucket: Bucket) -> None:
        full, share = p.bucket("grad", bucket), p.slice("grad", bucket)
        p.when = When.LAST
        for t in (full, share):
            p.mark_written(t)
        if p.ranks.zero == 0:
            p.emit(ops.all_reduce, into={"x": full})
        else:
            p.emit(ops.reduce_scatter, full, into={"share": share}, rank=p.ranks.rank)
            p.calls[-1].overwrites = frozenset({"share"})

    edits: Edits = defaultdict(list)
    for bucket, at in last.items():
        edits[at].append((bucket, partial(reduce, bucket)))
    _insert(p, edits)


def _shard_gradients(p: Program, ops: Collectives) -> None:
    """ZeRO 2 and 3: a bucket's gradients are an activation, written anew in every micro-batch. Its sum over ranks is
    added to the own share after the last writer, and its memory is free again."""
    ends, of, runs = joins(p), _gradients(p), _runs(p)
    edits: Edits = defaultdict(list)
    shares = {bucket: p.slice("grad", bucket) for bucket in p.trained}

    def reduce(bucket: Bucket, base: Tensor, written: list[tuple[int, int]], overlap: int) -> None:
        for start, stop in _gaps(bucket.size, written):  # the norm and the update read them
            gap = p.part_of(base, start, f"{base.name}.gap", (stop - start,), Role.GRAD)
            p.emit(ops.fill, into={"x": gap}, n=stop - start, value=0.0)
            p.calls[-1].overwrites = frozenset({"x"})
        p.emit(ops.reduce_scatter, base, into={"share": shares[bucket]}, rank=p.ranks.rank)
        p.calls[-1].overlap = overlap

    for bucket, uses in _spans(p, of, lambda c: c.outs):
        base = Tensor(f"d {bucket.name}", (bucket.size,), p.grad_dtype, Role.ACT)
        parts = {t: p.part_of(base, of[t][1], t.name, t.shape, Role.GRAD) for t in _distinct(uses)}
        is_new = set(parts)
        for i in dict.fromkeys(i for i, _ in uses):
            c = p.calls[i]
            firsts = {arg.name for arg, t in zip(c.op.out_args, c.outs) if t in is_new}
            c.overwrites |= frozenset(firsts)
            is_new -= {t for t in c.outs if t is not None}
            c.outs = tuple(parts.get(t, t) if t is not None else None for t in c.outs)
        at = max(ends[i] for i, _ in uses)
        written = [(of[t][1], t.size) for t in parts]
        overlap = sum(run <= runs[min(at, len(runs) - 1)] + 1 for run in runs[at:])  # a block later its memory is free
        edits[at].append((bucket, partial(reduce, bucket, base, written, overlap)))
    _insert(p, edits)


def _gradients(p: Program) -> Places:
    """The place of every gradient."""
    return {p.grad(t): (bucket, place) for bucket in p.trained for t, place in bucket.places()}


def _spans(
    p: Program, of: Places, tensors: Callable[[Call], Iterable[Tensor | None]]
) -> Iterator[tuple[Bucket, list[Use]]]:
    """The uses of each bucket's tensors, cut where calls of a whole other block lie between two of them: a tied head
    and embedding use one bucket at both ends of the list. A block's first call may write for its neighbour."""
    found: dict[Bucket, list[Use]] = defaultdict(list)
    runs = _runs(p)
    for i, c in enumerate(p.calls):
        for t in tensors(c):
            if t is not None and t in of:
                found[of[t][0]].append((i, t))
    for bucket, uses in found.items():
        begin = 0
        for k in range(1, len(uses) + 1):
            if k == len(uses) or runs[uses[k][0]] - runs[uses[k - 1][0]] > 1:
                yield bucket, uses[begin:k]
                begin = k


def _runs(p: Program) -> list[int]:
    """For every call, the number of blocks that the list has entered before it: the index of its run of calls."""
    run, runs, block = -1, [], None
    for c in p.calls:
        if run < 0 or (c.phase is not Phase.COMMUNICATE and c.block != block):
            run, block = run + 1, c.block
        runs.append(run)
    return runs


def _distinct(uses: list[Use]) -> list[Tensor]:
    return list(dict.fromkeys(t for _, t in uses))


def _gaps(size: int, written: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges of a bucket of this size that no (first element, size) covers."""
    end = 0
    for place, count in sorted(written):
        if end < place:
            yield end, place
        end = place + count
    if end < size:
        yield end, size


def _insert(p: Program, edits: Edits) -> None:
    """Records the edits, each with the source line of the call before it and the block of its bucket."""
    calls, p.calls = p.calls, []
    for i in range(len(calls) + 1):
        for bucket, record in edits.get(i, ()):
            with p.at(calls[max(i - 1, 0)], Phase.COMMUNICATE), p.block(bucket.block, prefix=False):
                p.when = When.ALWAYS
                record()
        if i < len(calls):
            p.calls.append(calls[i])
