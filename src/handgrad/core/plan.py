"""plan: turns lifetimes into byte offsets. One allocation: params | state | grads | activations | io.

Gradients of the first blocks are written last. Unless micro-batches accumulate, their memory holds activations until
then.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, Phase, Scratch, is_activation
from handgrad.core.params import Vector
from handgrad.core.program import Program
from handgrad.core.streams import joins
from handgrad.core.tensor import Tensor

ALIGN = 256  # bytes
REGIONS = ("params", "state", "grads", "activations", "io")
MIB = 1 << 20


def aligned(nbytes: int) -> int:
    """Rounded up to the arena's alignment, bytes."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class Lifetime:
    """Bytes that are in use from call `first` to call `last` of one list, both included."""

    owner: Tensor | Call  # a Call owns scratch
    nbytes: int
    first: int
    last: int


@dataclass
class Plan:
    """The layout of an arena. `offset` and `scratch` are in bytes from its start."""

    programs: tuple[Program, ...]
    offset: dict[Tensor, int] = field(default_factory=dict)
    scratch: dict[Call, int] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)  # flat vector: first byte
    region: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: (start, bytes)
    inside: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)  # as in the programs
    peak: dict[int, tuple[int, Call | None]] = field(default_factory=dict)  # program index: live bytes, call

    @property
    def nbytes(self) -> int:
        """Size of the arena in bytes."""
        return sum(size for _, size in self.region.values())

    @property
    def min_activation_bytes(self) -> int:
        """Lower bound of the bytes of activations (and gradients that share their memory): the most live at once."""
        return max((live for live, _ in self.peak.values()), default=0)

    @property
    def vectors(self) -> dict[str, Vector]:
        """The flat vectors, as the primary program declares them."""
        return {name: v for name, v in self.programs[0].vectors.items() if name in self.start}

    def part(self, vector: str, param: Tensor) -> tuple[int, DType]:
        """First byte and element type of a parameter's slice of a flat vector that is not sharded."""
        v = self.vectors[vector]
        return self.start[vector] + v.start(param) * v.dtype.size, v.dtype

    def memory_map(self) -> str:
        """The memory map: bytes by region, the call where activations peak, and activations kept by block."""
        lines = [f"{name:12} {size:>16,} B  {size / MIB:10.1f} MiB" for name, (_, size) in self.region.items()]
        lines.append(f"{'total':12} {self.nbytes:>16,} B  {self.nbytes / MIB:10.1f} MiB")
        live, call = self.peak.get(0, (0, None))
        if call is not None:
            lines.append(
                f"peak: {live / MIB:.1f} MiB of activations and gradients"
                f" at {call.phase} {call.op.name} of {call.block}, {call.where}"
            )
        return "\n".join(lines)

    def by_block(self) -> list[tuple[str, int, int, int]]:
        """Per block: bytes of parameters, of gradients and optimizer state, and of activations that backward reads."""
        p = self.programs[0]
        rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        vectors = self.vectors
        state = [v for name, v in vectors.items() if name != "param"]
        for info in p.params.values():
            rows[info.block][0] += info.tensor.nbytes // vectors["param"].shares
            held = (v.nbytes_of(info.tensor) // v.shares for v in state if v.covers(info.tensor))
            rows[info.block][1] += sum(held)
        read_later = {t for c in p.calls if c.phase is not Phase.FORWARD for t in c.ins if is_activation(t)}
        for t, c in p.producer.items():
            if c.phase is Phase.FORWARD and t in read_later:
                rows[c.block][2] += t.nbytes
        return [(block, params, state_and_grads, kept) for block, (params, state_and_grads, kept) in rows.items()]


def lifetimes(p: Program, scratch: Scratch, concurrent: bool = False) -> list[Lifetime]:
    """First and last use of every activation; scratch is live during its own call, outputs to the end of the list.

    concurrent: the tensors of a call that overlaps later calls are live until the call that waits for it (streams.py).
    """
    first: dict[Tensor, int] = {}
    last: dict[Tensor, int] = {}
    spans = []
    ends = [join - 1 for join in joins(p)] if concurrent else range(len(p.calls))
    for i, (c, end) in enumerate(zip(p.calls, ends)):
        for t in (p.inside[t][0] if t in p.inside else t for t in (*c.outs, *c.ins)):
            if t is not None and is_activation(t):
                first.setdefault(t, i)
                last[t] = max(end, last.get(t, 0))
        nbytes = scratch(c)
        if nbytes:
            spans.append(Lifetime(c, aligned(nbytes), i, end))
    for t in p.outputs.values():
        if is_activation(t):
            last[t] = len(p.calls)
    return spans + [Lifetime(t, aligned(t.nbytes), first[t], last[t]) for t in first]


Fixed = tuple[int, int, int, int]  # offset, end, first call, last call: bytes that are in use already


def place(spans: Sequence[Lifetime], fixed: Sequence[Fixed] = ()) -> tuple[dict[Tensor | Call, int], int]:
    """Offsets and total bytes: each span goes to the lowest gap between the spans that are live at the same time.

    Tries two orders and keeps the better: largest first suits activations alone, longest-lived first suits activations
    among gradients, whose offsets are fixed.
    """
    largest = sorted(spans, key=lambda s: (-s.nbytes, s.first))
    longest = sorted(spans, key=lambda s: (s.first - s.last, -s.nbytes))
    return min((_first_fit(order, fixed) for order in (largest, longest)), key=lambda placed: placed[1])


def _first_fit(spans: Sequence[Lifetime], fixed: Sequence[Fixed]) -> tuple[dict[Tensor | Call, int], int]:
    offsets: dict[Tensor | Call, int] = {}
    placed = sorted((low, aligned(high), first, last) for low, high, first, last in fixed)
    top = 0
    for span in spans:
        at = 0
        for low, high, first, last in placed:
            if last < span.first or span.last < first:
                continue
            if at + span.nbytes <= low:
                break
            if high > at:
                at = high
        offsets[span.owner] = at
        insort(placed, (at, aligned(at + span.nbytes), span.first, span.last))
        top = max(top, at + span.nbytes)
    return offsets, top


def gradient_spans(primary: Program, p: Program) -> list[Fixed]:
    """When bytes of the flat gradients are in use: from the first write to the end of p's list.

    The alignment padding between gradients is never reused: it must stay zero, because norm and update read it.
    """
    vector, end = primary.vectors["grad"], len(p.calls)
    size = vector.dtype.size
    written = {t: i for i, c in reversed(list(enumerate(p.calls))) for t in c.outs if t is not None}
    spans, at = [], 0
    for info in (info for bucket in vector.buckets for info in bucket.members):
        start = size * vector.start(info.tensor)
        stop = start + size * info.tensor.size
        spans.append((at, start, 0, end))
        if p is primary:
            gradient = p.grads.get(info.tensor.name)
            spans.append((start, stop, 0 if gradient is None else written.get(gradient, 0), end))
        at = stop
    spans.append((at, vector.nbytes, 0, end))
    return [span for span in spans if span[0] < span[1]]


def peak_of(p: Program, spans: Sequence[Lifetime], fixed: Sequence[Fixed] = ()) -> tuple[int, Call | None]:
    """The most bytes that are live at one call, and that call."""
    change = [0] * (len(p.calls) + 2)
    for nbytes, first, last in [(s.nbytes, s.first, s.last) for s in spans] + [(b - a, i, j) for a, b, i, j in fixed]:
        change[first] += nbytes
        change[last + 1] -= nbytes
    live = best = at = 0
    for i, delta in enumerate(change):
        live += delta
        if live > best:
            best, at = live, i
    return best, p.calls[min(at, len(p.calls) - 1)] if p.calls else None


def plan(*programs: Program, scratch: Scratch = lambda c: 0, concurrent: bool = False) -> Plan:
    """The layout of one arena for programs that share parameters and never run at the same time.

    scratch: bytes of scratch of a call
    concurrent: calls whose op allows it overlap the calls after them

    The first program is the primary one: its flat order lays out parameters, gradients and optimizer state; the other
    programs find theirs by name. Activations of different programs share memory; inputs, constants and caches do not.
    """
    primary, result = programs[0], Plan(programs)
    vectors = primary.vectors
    state = [name for name in vectors if name not in ("param", "grad")]
    at = 0
    for region, names in (("params", ["param"]), ("state", state), ("grads", ["grad"])):
        start = at
        for name in names:
            if name in vectors:
                result.start[name] = at
                at += aligned(vectors[name].nbytes)
        if region == "state":
            at = _place_states(result, at)
        result.region[region] = (start, at - start)
    _place_slices(result)
    shared = "grad" in vectors and not primary.accumulates and vectors["grad"].shares == 1
    start = result.region["grads"][0] if shared else at
    top = at - start
    for i, p in enumerate(programs):
        spans, fixed = lifetimes(p, scratch, concurrent), gradient_spans(primary, p) if shared else []
        offsets, size = place(spans, fixed)
        for owner, offset in offsets.items():
            if isinstance(owner, Call):
                result.scratch[owner] = start + offset
            else:
                result.offset[owner] = start + offset
        for t, (base, first) in p.inside.items():
            if base in offsets:  # else no call uses it
                result.offset[t] = result.offset[base] + first * t.dtype.size
        result.inside |= p.inside
        result.peak[i] = peak_of(p, spans, fixed)
        top = max(top, size)
    result.region["activations"] = (at, start + top - at)
    at = start = start + top
    for p in programs:
        for t in (p.scalars, *p.inputs.values(), *(t for t, _ in p.constants.values())):
            result.offset[t] = at
            at += aligned(t.nbytes)
    result.region["io"] = (start, at - start)
    return result


def _place_states(result: Plan, at: int) -> int:
    """Places states from byte `at` on; returns the byte after them. Programs share a state by its name: prefill and
    decode use one cache."""
    known: dict[str, Tensor] = {}
    for t in (t for p in result.programs for t in p.states.values()):
        other = known.setdefault(t.name, t)
        if (other.shape, other.dtype) != (t.shape, t.dtype):
            rule = f"programs that share state '{t.name}' agree on {other.shape} {other.dtype}"
            raise HandgradError("plan", rule, f"{t.shape} {t.dtype}")
        if other is t:
            result.offset[t] = at
            at += aligned(t.nbytes)
        else:
            result.offset[t] = result.offset[other]
    return at


def _place_slices(result: Plan) -> None:
    """Places parameters, gradients and slices of vectors of all programs, in the flat order of the primary one."""
    primary = result.programs[0]
    for p in result.programs:
        for name, info in p.params.items():
            known = primary.params.get(name)
            if known is None or known.tensor.shape != info.tensor.shape or p.dtype is not primary.dtype:
                rule = "programs that share an arena declare the same parameters"
                raise HandgradError("plan", rule, f"'{name}' in only one of them")
            if primary.vectors["param"].shares == 1:
                result.offset[info.tensor] = result.part("param", known.tensor)[0]
            if name in p.grads and primary.vectors["grad"].shares == 1:
                result.offset[p.grads[name]] = result.part("grad", known.tensor)[0]
    for t, first in primary.starts.items():
        result.offset[t] = result.start[t.flat] + first * t.dtype.size
