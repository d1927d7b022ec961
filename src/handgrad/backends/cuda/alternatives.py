"""Autotuning of alternatives: times the `Launches` that an op declares for a call and keeps the fastest on disk."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from handgrad.backends.cuda import cache, cudnn
from handgrad.backends.cuda.gemm_autotune import repeats
from handgrad.backends.cuda.graph import Graphs
from handgrad.backends.cuda.planner import WORTH_TUNING, GpuPlanner
from handgrad.core.op import Call
from handgrad.core.scalars import STEP_SCALARS_BYTES
from handgrad.core.tensor import Tensor
from handgrad.launch import Launches

PACKAGE = Path(__file__).parents[2]
AddressOf = Callable[["Tensor | str"], int]  # the address of a tensor, of "scalars" or of "scratch"
Bind = Callable[[Call, Launches, AddressOf], list[Callable[[], None]]]  # functions that start each launch


class Alternatives:
    """The choices made on one GPU, with one version of the libraries and of our kernels."""

    def __init__(self, graphs: Graphs, planner: GpuPlanner, version: int):
        self._graphs, self._planner = graphs, planner
        library = cudnn.library() if planner.gpu.has_library_attention else None
        attention = None if library is None else library.backend_version()
        files = sorted([*PACKAGE.rglob("*.cu*"), *(PACKAGE / "ops").rglob("*.h")])
        kernels = [path.read_text() for path in files]  # changed kernels are autotuned again
        self._file = cache.key("alternatives", version, attention, graphs.device.name, *kernels) + ".json"
        self._known: dict[str, int] = {} if planner.gpu.deterministic else json.loads(cache.load(self._file) or b"{}")

    def chosen(self, c: Call) -> Launches:
        """The fastest alternative; the first one if none was timed."""
        first = self._planner.launches(c)
        return first if first.alternative is None else first.alternatives()[self._known.get(key(c, first), 0)]

    def choices(self) -> dict[str, int]:
        """All choices."""
        return self._known

    def take(self, choices: dict[str, int]) -> None:
        """Adopts choices that were made on another GPU of the same model."""
        self._known = dict(choices)

    def untimed(self, calls: list[Call]) -> dict[str, Call]:
        """By key: one call of each kind whose alternatives are worth timing and have not been timed."""
        if self._planner.gpu.deterministic:
            return {}
        found = {}
        for c in calls:
            first = self._planner.launches(c)
            if first.alternative is not None and c.op.flops(c) >= WORTH_TUNING and key(c, first) not in self._known:
                found[key(c, first)] = c
        return found

    def tune(self, calls: dict[str, Call], bind: Bind, scratch: Callable[[Call], int]) -> None:
        """Times the alternatives of `untimed` calls, in temporary device memory."""
        device = self._graphs.device
        for name, c in calls.items():
            nbytes: dict[Tensor | str, int] = {"scratch": scratch(c), "scalars": STEP_SCALARS_BYTES}
            nbytes |= {t: t.nbytes for t in (*c.ins, *c.outs) if t is not None}
            at = {t: device.alloc(max(n, 256)) for t, n in nbytes.items()}
            try:
                for t, n in nbytes.items():
                    if t != "scalars":
                        device.randomise(at[t], n)
                device.fill(at["scalars"], STEP_SCALARS_BYTES)
                bound = [bind(c, a, at.__getitem__) for a in self._planner.launches(c).alternatives()]
                taken = self._graphs.measure([(partial(_start, starts), repeats(c.op.flops(c))) for starts in bound])
                self._known[name] = taken.index(min(taken))
            finally:
                device.sync()
                for address in at.values():
                    device.free(address)
        if calls:
            cache.store(self._file, json.dumps(self._known).encode())


def key(c: Call, first: Launches) -> str:
    """A name for all that the choice depends on: the alternatives, written out, and the element types."""
    return cache.key(first, [None if t is None else t.dtype.name for t in (*c.ins, *c.outs)])


def _start(starts: list[Callable[[], None]]) -> None:
    for start in starts:
        start()
