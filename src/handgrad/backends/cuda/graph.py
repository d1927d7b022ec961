"""CUDA graphs: captures the work of a stream, replays it as one launch, and times replays for autotuning.

Kernels with a dynamic tile scheduler need their counter zeroed. cuBLASLt and cuDNN add a memset node before each such
kernel, and the GPU idles there: 2 % of a training step. Here every captured launch gets its own counter; one memset
zeroes all of them as the graph starts, and capture removes the library's nodes.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from handgrad.backends.cuda.driver import Device, check, cu

COUNTER_BYTES, COUNTERS = 256, 4096  # a workspace of at most this size is a counter; counters per graph
SAMPLES = 3  # timed runs of each candidate


class Graphs:
    """Captures graphs on a device's stream. All graphs share one array of counters."""

    def __init__(self, device: Device):
        self.device, self._counters = device, device.alloc(COUNTER_BYTES * COUNTERS)
        self._taken = COUNTERS  # counters are free only during a capture

    def workspace(self, nbytes: int, address: int) -> int:
        """The workspace of the next launch: its own counter if it is captured and nbytes fit in one, else `address`."""
        if nbytes > COUNTER_BYTES or self._taken == COUNTERS:
            return address
        self._taken += 1
        return self._counters + (self._taken - 1) * COUNTER_BYTES

    def capture(self, work: Callable[[], None]) -> "Graph":
        """The graph of what `work` launches. Nothing runs yet."""
        self._taken, stream = 0, self.device.stream
        check(cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            self.device.fill(self._counters, COUNTER_BYTES * COUNTERS)
            work()
        finally:
            self._taken, captured = COUNTERS, cu.cuStreamEndCapture(stream)
        return Graph(check(captured), stream, self._zeroes_counter)

    def _zeroes_counter(self, node: Any) -> bool:
        """Whether a node only zeroes one counter."""
        if check(cu.cuGraphNodeGetType(node)) != cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
            return False
        p = check(cu.cuGraphMemsetNodeGetParams(node))
        at, nbytes = int(p.dst) - self._counters, p.elementSize * p.width * p.height
        return p.value == 0 and nbytes <= COUNTER_BYTES and 0 <= at < COUNTER_BYTES * COUNTERS

    def measure(self, starts: Sequence[tuple[Callable[[], None], int]]) -> list[float]:
        """Seconds of each candidate (a function that starts it, runs per sample): the median of SAMPLES samples.

        Training heats the GPU until its clocks drop, so candidates are compared hot: warmed up and interleaved.
        """
        device = self.device
        times: list[list[float]] = [[] for _ in starts]
        begin, end = device.event(True), device.event(True)
        for start, _ in starts:  # once eagerly, because libraries may load kernels, which capture forbids
            start()
        graphs = [self.capture(partial(_repeat, start, n)) for start, n in starts]
        for sample in range(SAMPLES + 1):
            for mine, graph, (_, repeats) in zip(times, graphs, starts):
                device.record(begin)
                graph.replay()
                device.record(end)
                if sample:  # the first only warms up
                    mine.append(device.seconds(begin, end) / repeats)
        return [statistics.median(t) for t in times]


class Graph:
    """A captured graph, instantiated without its `unwanted` nodes. removed: the number of these."""

    def __init__(self, captured: Any, stream: Any, unwanted: Callable[[Any], bool]):
        self._stream, self._executable, self.removed = stream, None, 0
        _, count = check(cu.cuGraphGetNodes(captured))
        for node in check(cu.cuGraphGetNodes(captured, count))[0]:
            if unwanted(node):
                _remove(captured, node)
                self.removed += 1
        self._executable = check(cu.cuGraphInstantiate(captured, 0))
        check(cu.cuGraphDestroy(captured))
        check(cu.cuGraphUpload(self._executable, stream))

    def replay(self) -> None:
        check(cu.cuGraphLaunch(self._executable, self._stream))

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone at the end of the process
            cu.cuGraphExecDestroy(self._executable)


def _repeat(start: Callable[[], None], times: int) -> None:
    for _ in range(times):
        start()


def _remove(graph: Any, node: Any) -> None:
    """Removes a node and makes its successors depend on its predecessors."""
    before, after = _all(cu.cuGraphNodeGetDependencies, node), _all(cu.cuGraphNodeGetDependentNodes, node)
    check(cu.cuGraphDestroyNode(node))
    for late in after:
        known = {int(n) for n in _all(cu.cuGraphNodeGetDependencies, late)}
        new = [early for early in before if int(early) not in known]
        check(cu.cuGraphAddDependencies(graph, new, [late] * len(new), None, len(new)))


def _all(query: Callable[..., tuple], node: Any) -> list[Any]:
    """The nodes that a query returns."""
    *_, count = check(query(node))
    return check(query(node, count))[0] if count else []
