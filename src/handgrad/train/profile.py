"""profile: the time of every call of a step, with its lower bound: its bytes and flops at the hardware's limits."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from handgrad.core.listing import PHASE
from handgrad.core.op import Call
from handgrad.core.streams import joins
from handgrad.train.scaling import sent
from handgrad.train.trainer import Trainer

GROUPS = ("op", "phase", "block", "call")
LEARNING_RATE = 1e-4  # tokens are random: there is nothing to learn, and weights must not grow


@dataclass(frozen=True)
class Row:
    """Some calls together. `bound`: the least seconds they can take at the hardware's limits, None if unknown."""

    name: str
    calls: int
    seconds: float
    nbytes: int
    flops: int
    bound: float | None


@dataclass(frozen=True)
class Profile:
    """One step of a micro-batch, timed call by call.

    seconds         of each call, median over the traces
    step_seconds    of a whole step, median
    exposed         seconds of it in which computation waited for other ranks, median
    sent            bytes that this rank sends to others in each call
    joins           for every call the index of the one that waits for it
    flops_limit     FLOP/s of the hardware's matmuls, None if unknown
    bytes_limit     bytes/s of its memory, None if unknown
    """

    calls: tuple[Call, ...]
    seconds: tuple[float, ...]
    step_seconds: float
    exposed: float
    sent: tuple[int, ...]
    joins: tuple[int, ...]
    flops_limit: float | None = None
    bytes_limit: float | None = None

    @property
    def total(self) -> float:
        """Seconds of all calls, each by itself."""
        return sum(self.seconds)

    def bound(self, c: Call) -> float | None:
        """The least seconds a call can take: its bytes at the memory's bandwidth, or its flops at the peak."""
        if self.flops_limit is None or self.bytes_limit is None:
            return None
        return max(c.op.nbytes(c) / self.bytes_limit, c.flops / self.flops_limit)

    def rows(self, by: str = "op") -> list[Row]:
        """The calls by "op", "phase" or "block", slowest first; or by "call", as they are listed."""
        groups: dict[str, list[int]] = {}
        for i, c in enumerate(self.calls):
            key = {"op": c.op.name, "phase": str(c.phase), "block": c.block, "call": f"{i:4} {title(c)}"}[by]
            groups.setdefault(key, []).append(i)
        rows = [self._row(name, indices) for name, indices in groups.items()]
        return rows if by == "call" else sorted(rows, key=lambda row: -row.seconds)

    def _row(self, name: str, indices: Iterable[int]) -> Row:
        calls = [self.calls[i] for i in indices]
        bounds = [bound for c in calls if (bound := self.bound(c)) is not None]
        return Row(
            name,
            len(calls),
            sum(self.seconds[i] for i in indices),
            sum(c.op.nbytes(c) for c in calls),
            sum(c.flops for c in calls),
            sum(bounds) if len(bounds) == len(calls) else None,
        )

    def links(self) -> list[tuple[str, int, int, float]]:
        """What this rank exchanges by op: (name, calls, bytes that it sends, seconds of each call by itself)."""
        found: dict[str, list[float]] = {}
        for c, nbytes, seconds in zip(self.calls, self.sent, self.seconds):
            if c.op.communicates:
                row = found.setdefault(c.op.name, [0, 0, 0.0])
                row[:] = row[0] + 1, row[1] + nbytes, row[2] + seconds
        return [(name, int(calls), int(nbytes), seconds) for name, (calls, nbytes, seconds) in found.items()]

    def starts(self) -> list[float]:
        """When each call starts, in seconds: computation in one lane, what ranks exchange in another. A call that uses
        the result of an exchange waits for it."""
        now = free = 0.0
        ends: list[tuple[int, float]] = []  # of exchanges: the call that waits, and when it may start
        found = []
        for i, (c, seconds) in enumerate(zip(self.calls, self.seconds)):
            now = max([now, *(end for join, end in ends if join <= i)])
            if c.op.communicates:
                found.append(max(now, free))
                free = found[-1] + seconds
                ends.append((self.joins[i], free))
            else:
                found.append(now)
                now += seconds
        return found

    def write_trace(self, path: str | Path) -> None:
        """Writes the calls as a Chrome trace (https://ui.perfetto.dev reads it): end to end, a track for each phase.
        Collectives overlap what computes."""
        tracks = {phase: i for i, phase in enumerate(dict.fromkeys(c.phase for c in self.calls))}
        events: list[dict] = [
            {"ph": "M", "pid": 0, "tid": track, "name": "thread_name", "args": {"name": phase}}
            for phase, track in tracks.items()
        ]
        for c, seconds, at in zip(self.calls, self.seconds, self.starts()):
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": tracks[c.phase],
                    "ts": 1e6 * at,
                    "dur": 1e6 * seconds,
                    "name": c.op.name,
                    "cat": c.phase,
                    "args": arguments(c, seconds),
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def title(c: Call) -> str:
    """A call in a few words: phase, block, op, sizes."""
    sizes = " ".join(f"{name}={size}" for name, size in c.sizes.items() if name not in c.attrs)
    return f"{PHASE[c.phase]} {c.block} {c.op.name} {sizes}"


def arguments(c: Call, seconds: float) -> dict[str, str | int | float]:
    """What a viewer shows of a call: every tensor, and its bytes, flops and speeds."""
    args = (*zip(c.op.out_args, c.outs), *zip(c.op.in_args, c.ins))
    tensors = {arg.name: f"({','.join(map(str, t.shape))}) {t.dtype}" for arg, t in args if t is not None}
    nbytes, seconds = c.op.nbytes(c), max(seconds, 1e-9)
    figures = {"bytes": nbytes, "flops": c.flops, "GB/s": nbytes / seconds / 1e9, "TFLOP/s": c.flops / seconds / 1e12}
    return {"block": c.block, "where": c.where} | tensors | figures


def profile(
    trainer: Trainer, steps: int = 3, *, flops_limit: float | None = None, bytes_limit: float | None = None
) -> Profile:
    """Runs `steps` whole steps, then `steps` call by call. Both change the weights of the trainer.

    Of a step that accumulates, only the first micro-batch is timed call by call: give the trainer one.

    >>> import handgrad as hg
    >>> data = hg.data.tokens(shards, seq_len=16, batch_tokens=64)
    >>> model = hg.models.GPT2(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    >>> found = profile(hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(micro_batch=4)), steps=1)
    >>> sorted(row.name for row in found.rows("phase"))
    ['backward', 'forward', 'norm', 'recompute', 'update']
    """
    warm = 3 if trainer.backend.is_asynchronous else 1  # a device's first steps compile, capture, and start the queue
    results = [trainer.step(trainer.last_step + 1, LEARNING_RATE) for _ in range(warm + steps)]
    results[-1].wait()  # the queue is empty when the traces begin
    marks = [result.end for result in results[warm - 1 :]]
    step_seconds = statistics.median(trainer.backend.seconds(*pair) for pair in pairwise(marks))
    exposed = statistics.median(result.exposed for result in results[warm:])
    traces = [trace(trainer) for _ in range(steps)]
    calls, p = tuple(c for c, _ in traces[0]), trainer.program
    at = {c: i for i, c in enumerate(calls)}
    ends = [at.get(p.calls[end], end) if end < len(p.calls) else len(calls) for end in joins(p)]
    sizes = tuple(sent(c, p.ranks.world) if c.op.communicates else 0 for c in calls)
    medians = tuple(statistics.median(seconds for _, seconds in same) for same in zip(*traces))
    waits = tuple(end for c, end in zip(p.calls, ends) if c in at)
    return Profile(calls, medians, step_seconds, exposed, sizes, waits, flops_limit, bytes_limit)


def trace(trainer: Trainer) -> list[tuple[Call, float]]:
    """Runs a step call by call; returns the calls and their seconds."""
    found: list[tuple[Call, float]] = []
    trainer.trace(lambda c, seconds: found.append((c, seconds)))
    return found
