"""Graphs: what is started on a stream, captured once and replayed as one; and races, which time replays.

A library's kernel that hands out its tiles by a counter has that counter zeroed by a node of its own before it, and the
card stands still for it: 2 % of a training step. Here every launch of a graph has a counter of its own; all are zeroed
at once as the graph starts, and the nodes between are cut out.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from handgrad.backends.cuda.driver import Device, check, cu

COUNTER, COUNTERS = 256, 4096  # bytes of workspace that pass for a counter, and how many launches of a graph have one
TURNS = 3  # times that a work is timed


class Graphs:
    """Captures what is started on a card's stream, which replays share, and with it the room for counters."""

    def __init__(self, device: Device):
        self.device, self._counters = device, device.alloc(COUNTER * COUNTERS)
        self._taken = COUNTERS  # all, but while something is captured

    def room(self, nbytes: int, workspace: int) -> int:
        """Where the next launch has nbytes of workspace: a counter of its own if it is captured and that will do."""
        if nbytes > COUNTER or self._taken == COUNTERS:
            return workspace
        self._taken += 1
        return self._counters + (self._taken - 1) * COUNTER

    def capture(self, work: Callable[[], None]) -> "Graph":
        """What `work` starts; nothing runs yet."""
        self._taken, stream = 0, self.device.stream
        check(cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            self.device.fill(self._counters, COUNTER * COUNTERS)
            work()
        finally:
            self._taken, captured = COUNTERS, cu.cuStreamEndCapture(stream)
        return Graph(check(captured), stream, self._zeroes_counter)

    def _zeroes_counter(self, node: Any) -> bool:
        """Whether a node does nothing but zero one counter."""
        if check(cu.cuGraphNodeGetType(node)) != cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
            return False
        p = check(cu.cuGraphMemsetNodeGetParams(node))
        at, nbytes = int(p.dst) - self._counters, p.elementSize * p.width * p.height
        return p.value == 0 and nbytes <= COUNTER and 0 <= at < COUNTER * COUNTERS

    def race(self, starts: Sequence[tuple[Callable[[], None], int]]) -> list[float]:
        """Seconds that each of some works takes, begun so many times in a row; the median of a few turns.

        A step heats the card until its clocks fall, so they are compared hot: warmed up, and in turn.
        """
        device, times = self.device, [[] for _ in starts]
        begin, end = device.event(True), device.event(True)
        for start, _ in starts:  # once as it comes: then a library loads its kernel
            start()
        graphs = [self.capture(lambda start=start, n=n: [start() for _ in range(n)]) for start, n in starts]
        for turn in range(TURNS + 1):
            for mine, graph, (_, repeats) in zip(times, graphs, starts):
                device.record(begin)
                graph.replay()
                device.record(end)
                if turn:  # the first only warms up
                    mine.append(device.seconds(begin, end) / repeats)
        return [statistics.median(t) for t in times]


class Graph:
    """A captured graph, ready to run. `cut`: how many nodes were left out, each of which `unwanted` accepted."""

    def __init__(self, captured: Any, stream: Any, unwanted: Callable[[Any], bool]):
        self._stream, self._executable, self.cut = stream, None, 0
        _, count = check(cu.cuGraphGetNodes(captured))
        for node in check(cu.cuGraphGetNodes(captured, count))[0]:
            if unwanted(node):
                _take_out(captured, node)
                self.cut += 1
        self._executable = check(cu.cuGraphInstantiate(captured, 0))
        check(cu.cuGraphDestroy(captured))
        check(cu.cuGraphUpload(self._executable, stream))

    def replay(self) -> None:
        check(cu.cuGraphLaunch(self._executable, self._stream))

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone at the end of the process
            cu.cuGraphExecDestroy(self._executable)


def _take_out(graph: Any, node: Any) -> None:
    """Removes a node; what came after it comes after what came before it."""
    before, after = _all(cu.cuGraphNodeGetDependencies, node), _all(cu.cuGraphNodeGetDependentNodes, node)
    check(cu.cuGraphDestroyNode(node))
    for late in after:
        known = {int(n) for n in _all(cu.cuGraphNodeGetDependencies, late)}
        new = [early for early in before if int(early) not in known]
        check(cu.cuGraphAddDependencies(graph, new, [late] * len(new), None, len(new)))


def _all(query: Callable[..., tuple], node: Any) -> list[Any]:
    """The nodes that a query answers."""
    *_, count = check(query(node))
    return check(query(node, count))[0] if count else []
