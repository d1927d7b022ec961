"""sockets: ranks are processes that exchange arrays by TCP, without any package. comm.py adds them up."""

import os
import select
import socket
import time
from collections.abc import Sequence

import numpy as np

from handgrad.backends.ranks.comm import LAST_EXCHANGE_SECONDS, Comm, RankError
from handgrad.backends.ranks.mesh import Links
from handgrad.backends.ranks.watch import Watch
from handgrad.core.errors import HandgradError

CHANNELS = ("watch", "data", "last")  # of a connection: for failures, for arrays, for the exchange after a failure
POLL_MILLISECONDS = 200  # between checks of the watch while a rank waits
BUFFER_BYTES = 4 << 20  # the kernel may hold of an array that is being sent


class Sockets(Comm):
    """A rank that is a process. limit: seconds after which waiting is an error, 0: none."""

    def __init__(self, rank: int, world: int, links: Links, watch: Watch | None, limit: float = 0.0):
        self.rank, self.world, self.watch, self._limit = rank, world, watch, limit
        self._last = {r: link for (r, channel), link in links.items() if channel == "last"}
        self._data = {r: link for (r, channel), link in links.items() if channel == "data"}
        for link in self._data.values():
            for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                link.setsockopt(socket.SOL_SOCKET, side, BUFFER_BYTES)

    def all_to_all(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        self.check()
        out = {r: send[r].data for r in self._data if send[r].size}
        into = {r: receive[r].data for r in self._data if receive[r].size}
        begin = time.monotonic()
        while out or into:
            if not (self._send(out) + self._receive(into)):
                self._wait(out, into, begin)

    def _send(self, out: dict[int, memoryview]) -> int:
        """Sends what the sockets take now; returns the bytes."""
        count = 0
        for r, part in list(out.items()):
            try:
                sent = self._data[r].send(part)
            except BlockingIOError:
                continue
            except OSError:
                raise self._gone(r) from None
            count += sent
            if sent < len(part):
                out[r] = part[sent:]
            else:
                del out[r]
        return count

    def _receive(self, into: dict[int, memoryview]) -> int:
        """Receives what has arrived; returns the bytes."""
        count = 0
        for r, part in list(into.items()):
            try:
                got = self._data[r].recv_into(part)
            except BlockingIOError:
                continue
            except OSError:
                got = 0
            if not got:
                raise self._gone(r)
            count += got
            if got < len(part):
                into[r] = part[got:]
            else:
                del into[r]
        return count

    def _wait(self, out: dict[int, memoryview], into: dict[int, memoryview], begin: float) -> None:
        poll = select.poll()
        for r in {*out, *into}:
            poll.register(self._data[r], select.POLLOUT * (r in out) | select.POLLIN * (r in into))
        poll.poll(POLL_MILLISECONDS)
        self.check()
        if self._limit and time.monotonic() - begin > self._limit:
            raise HandgradError("ranks", f"a rank has not answered for {self._limit:.0f} s")

    def _gone(self, rank: int) -> RankError:
        """The error of a rank whose connection has ended: what the watch knows of it, a moment later."""
        end = time.monotonic() + 2.0
        while self.watch is not None and time.monotonic() < end:
            self.check()
            time.sleep(0.01)
        return RankError(rank, "its process has ended", 1, is_gone=True)

    def after_failure(self) -> Comm:
        links = {(r, "data"): link for r, link in self._last.items()}
        return Sockets(self.rank, self.world, links, None, LAST_EXCHANGE_SECONDS)

    def close(self) -> None:
        """Says that this rank has done its work. After an error, a device that waits for a rank that has failed would
        keep the process."""
        if self.watch is not None:
            self.watch.close()
            if self.watch.is_over and self.is_stuck():
                os._exit(1)
