"""The faster of the ways to do a call, by the card's clock, kept on disk."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from handgrad.backends.cuda import cache, cudnn
from handgrad.backends.cuda.card import WORTH_TUNING, Card
from handgrad.backends.cuda.graph import Graphs
from handgrad.backends.cuda.tune import repeats
from handgrad.core.launch import Launches
from handgrad.core.op import Call
from handgrad.core.scalars import STEP_SCALARS
from handgrad.core.tensor import Tensor

PACKAGE = Path(__file__).parents[2]
Place = Callable[["Tensor | str"], int]  # the address of a tensor, of "scalars" and of "scratch"
Bind = Callable[[Call, Launches, Place], list[Callable[[bool], None]]]  # what starts each launch


class Ways:
    """What was chosen on one card, with one version of the libraries and of our kernels."""

    def __init__(self, graphs: Graphs, card: Card, version: int):
        self._graphs, self._card = graphs, card
        attention = card.gpu.cudnn and cudnn.library().backend_version()
        kernels = [path.read_text() for path in sorted(PACKAGE.rglob("*.cu*"))]  # another text, another race
        self._file = cache.key("ways", version, attention, graphs.device.name, *kernels) + ".json"
        self._known: dict[str, int] = {} if card.gpu.deterministic else json.loads(cache.load(self._file) or b"{}")

    def chosen(self, c: Call) -> Launches:
        """The faster way, or the first where nothing was timed."""
        first = self._card.launches(c)
        return first if first.instead is None else first.ways()[self._known.get(key(c, first), 0)]

    def open(self, calls: list[Call]) -> dict[str, Call]:
        """Calls, one of a kind, whose ways are worth timing and were not timed yet."""
        if self._card.gpu.deterministic:
            return {}
        found = {}
        for c in calls:
            first = self._card.launches(c)
            if first.instead is not None and c.op.flops(c) >= WORTH_TUNING and key(c, first) not in self._known:
                found[key(c, first)] = c
        return found

    def race(self, calls: dict[str, Call], bind: Bind, scratch: Callable[[Call], int]) -> None:
        """Times what `open` gave, on memory that is given back."""
        device = self._graphs.device
        for name, c in calls.items():
            nbytes = {t: t.nbytes for t in (*c.ins, *c.outs) if t is not None}
            nbytes |= {"scratch": scratch(c), "scalars": 8 * len(STEP_SCALARS)}
            at = {t: device.alloc(max(n, 256)) for t, n in nbytes.items()}
            try:
                for t, n in nbytes.items():
                    if t != "scalars":
                        device.randomise(at[t], n)
                device.fill(at["scalars"], 8 * len(STEP_SCALARS))
                ways = [bind(c, way, at.__getitem__) for way in self._card.launches(c).ways()]
                taken = self._graphs.race([(partial(_start, starts), repeats(c.op.flops(c))) for starts in ways])
                self._known[name] = taken.index(min(taken))
            finally:
                device.sync()
                for address in at.values():
                    device.free(address)
        if calls:
            cache.store(self._file, json.dumps(self._known).encode())


def key(c: Call, first: Launches) -> str:
    """What the choice depends on: all ways, written out, and the types."""
    return cache.key(first, [None if t is None else t.dtype.name for t in (*c.ins, *c.outs)])


def _start(starts: list[Callable[[bool], None]]) -> None:
    for start in starts:
        start(True)
