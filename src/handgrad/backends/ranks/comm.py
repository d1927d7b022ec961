"""comm: the collectives of ranks, on arrays in host memory. sockets.py and mpi.py move the bytes between processes;
`Alone` is one rank.

Sums are in the order of the ranks, so they are the same bits on every rank and in every run: a rank receives its part
of an array from all others, adds the parts itself, and sends the sum.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.op import Call

if TYPE_CHECKING:
    from handgrad.backends.ranks.watch import Watch

MESSAGE_BYTES = 1 << 26  # go to one rank at a time, at most
CHUNK_SIZE = 1 << 20  # elements that are received at a time from each rank: 4 MiB of float32, which stay in the cache
LAST_EXCHANGE_SECONDS = 16.0  # a rank waits for the others after an error: longer than for its GPU (cuda/nccl.py)


class RankError(HandgradError):
    """The error of another rank. code: the exit code with which that one ends; is_gone: it does not answer any more."""

    def __init__(self, rank: int, text: str, code: int = 2, is_gone: bool = False):
        super().__init__(f"rank {rank}", text.removesuffix("."))
        self.rank, self.code, self.is_gone = rank, code, is_gone


class Comm(ABC):
    """The ranks that train together, seen from one of them. All of them make the same calls in the same order."""

    rank: int
    world: int
    local_world: int = 1  # ranks on this machine
    local_rank: int = 0  # this one's number among them
    watch: "Watch | None" = None  # tells of failures, where ranks are processes
    is_stuck: Callable[[], bool] = staticmethod(lambda: False)  # whether a device waits for a rank that has failed

    @abstractmethod
    def all_to_all(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        """Sends send[r] to rank r and fills receive[r] with what rank r sends here; the own entries are not used.

        The arrays are contiguous. Raises RankError if another rank has failed.
        """

    def fail(self, text: str, code: int = 2) -> None:
        """Tells all others that this rank ends: their next call, or the one they wait in, raises RankError."""
        if self.watch is not None:
            self.watch.fail(text, code)

    def check(self) -> None:
        """Raises RankError if another rank is known to have failed."""
        if self.watch is not None:
            self.watch.check()

    def reporting_excepthook(self, hook: Callable) -> Callable:
        """An excepthook that also tells the others of an error that ends this process."""

        def tell(kind: Any, error: Any, trace: Any) -> None:
            hook(kind, error, trace)
            self.fail(f"{kind.__name__}: {error}", 1)

        return tell

    @abstractmethod
    def after_failure(self) -> "Comm":
        """The same ranks again, for a last exchange after `fail` or RankError. It raises HandgradError where a rank
        does not answer in time."""

    def run(self, c: Call, operands: SimpleNamespace) -> None:
        """Runs a call that communicates, and counts the time that it takes: computation waits for all of it.

        operands: of the call, as `HostMemory.operands` returns them
        """
        begin = time.perf_counter_ns()
        c.op.exchange(self, operands)
        operands.scalars.exposed_ns += np.uint64(time.perf_counter_ns() - begin)

    def reduce_scatter(self, full: np.ndarray, share: np.ndarray, adds: bool = False) -> None:
        """share = this rank's part of the sum over ranks of `full`, or += if `adds`.

        full: (world * n);  share: (n), which may be that part of `full` itself; both of any shape
        """
        full, share = self._flat_pair(full, share)
        self._reduce(full, [r * share.size for r in range(self.world + 1)], share, adds)

    def all_reduce(self, x: np.ndarray) -> None:
        """x = the sum over ranks of x, of any shape."""
        x = _flat(x)
        bounds = [x.size * r // self.world for r in range(self.world + 1)]
        self._reduce(x, bounds, x[bounds[self.rank] : bounds[self.rank + 1]], False)
        parts = [x[a:b] for a, b in zip(bounds, bounds[1:])]
        self._chunked_all_to_all([parts[self.rank]] * self.world, parts, max(part.nbytes for part in parts))

    def all_gather(self, share: np.ndarray, full: np.ndarray) -> None:
        """full (world * n) = the shares (n) of all ranks; `share` may be the own part of `full`; both of any shape."""
        full, share = self._flat_pair(full, share)
        parts = [full[r * share.size : (r + 1) * share.size] for r in range(self.world)]
        if parts[self.rank].ctypes.data != share.ctypes.data:
            parts[self.rank][...] = share
        self._chunked_all_to_all([parts[self.rank]] * self.world, parts, share.nbytes)

    def all_gather_bytes(self, message: bytes = b"") -> list[bytes]:
        """The messages of all ranks, in their order."""
        own = np.frombuffer(message, np.uint8)
        sizes = np.zeros(self.world, np.int64)
        sizes[self.rank] = own.size
        self.all_gather(sizes[self.rank : self.rank + 1], sizes)
        received = [np.empty(n, np.uint8) for n in sizes]
        received[self.rank] = own
        self._chunked_all_to_all([own] * self.world, received, int(sizes.max()))
        return [r.tobytes() for r in received]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, what JSON can hold, in the order of the ranks."""
        return [json.loads(m) for m in self.all_gather_bytes(json.dumps(value).encode())]

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return self.total(value) > 0

    def total(self, value: float) -> float:
        """The sum over ranks of a number, in float64."""
        values = np.zeros(self.world)
        values[self.rank] = value
        self.all_gather(values[self.rank : self.rank + 1], values)
        return float(sum(values.tolist()))

    def gather(self, piece: np.ndarray) -> list[np.ndarray]:
        """On rank 0 the pieces (n) of all ranks, of one type and any size, in their order; elsewhere nothing."""
        sizes = [int(n) for n in self.all_gather_object(piece.size)]
        empty = np.empty(0, np.uint8)
        received = [np.empty(n if self.rank == 0 and r else 0, piece.dtype) for r, n in enumerate(sizes)]
        send = [piece if r == 0 and self.rank else empty for r in range(self.world)]
        self._chunked_all_to_all(send, received, max(sizes) * piece.itemsize)
        return [piece, *received[1:]] if self.rank == 0 else []

    def _flat_pair(self, full: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both as vectors in the same memory. Raises ValueError unless `full` has the size of all shares."""
        if full.size != self.world * share.size:
            raise ValueError(f"{self.world} shares of {share.size} elements fill an array, but got one of {full.size}")
        return _flat(full), _flat(share)

    def _chunked_all_to_all(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray], most: int) -> None:
        """`all_to_all` in chunks: MPI counts in 31 bits. most: bytes of the largest message of any rank."""
        sends, receives = [_bytes(a) for a in send], [_bytes(a) for a in receive]
        for at in range(0, most, MESSAGE_BYTES):
            self.all_to_all([a[at : at + MESSAGE_BYTES] for a in sends], [a[at : at + MESSAGE_BYTES] for a in receives])

    def _reduce(self, full: np.ndarray, bounds: list[int], out: np.ndarray, adds: bool) -> None:
        """out = or += the sum over ranks of full[bounds[rank] : bounds[rank + 1]], a chunk at a time."""
        sums = np.float64 if full.dtype == np.float64 else np.float32
        begin, sizes = bounds[self.rank], [b - a for a, b in zip(bounds, bounds[1:])]
        buffer = np.empty((self.world, min(max(sizes), CHUNK_SIZE)), full.dtype)
        for at in range(0, max(sizes), CHUNK_SIZE):
            pieces = [full[bounds[r] + at : bounds[r] + min(at + CHUNK_SIZE, max(n, at))] for r, n in enumerate(sizes)]
            own = full[begin + at : begin + at + pieces[self.rank].size]
            received = [buffer[r, : own.size] for r in range(self.world)]
            self.all_to_all([_bytes(a) for a in pieces], [_bytes(a) for a in received])
            received[self.rank] = own
            total: Any = received[0].astype(sums)
            for other in received[1:]:
                total += other.astype(sums, copy=False)
            target: Any = out[at : at + own.size]
            target[...] = target.astype(sums, copy=False) + total if adds else total


def _bytes(a: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array."""
    return _flat(a).view(np.uint8)


def _flat(a: np.ndarray) -> np.ndarray:
    """A contiguous array as a vector in the same memory. Raises ValueError for any other: a copy would be filled."""
    if not a.flags.c_contiguous:
        raise ValueError(f"ranks exchange contiguous arrays, but got strides {a.strides} of shape {a.shape}")
    return a.reshape(-1)


class Alone(Comm):
    """One rank: it sends nothing."""

    rank, world = 0, 1

    def all_to_all(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        pass

    def total(self, value: float) -> float:
        return float(value)  # asked for three times a step

    def after_failure(self) -> Comm:
        return self


class Planned(Alone):
    """The first of some ranks that only exist in a plan."""

    def __init__(self, world: int):
        self.world = world
