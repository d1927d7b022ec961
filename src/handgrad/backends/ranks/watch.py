"""watch: a thread that learns at once that another rank has failed, has ended, or does not answer any more.

Each rank sends every other one a heartbeat a second, whatever its main thread waits for.
"""

import json
import select
import socket
import threading
import time
from collections.abc import Callable

from handgrad.backends.ranks.comm import RankError

HEARTBEAT_SECONDS = 1.0  # between two of them
TIMEOUT_SECONDS = 20.0  # without a heartbeat, after which a rank counts as gone
BYE = "bye"


class Watch(threading.Thread):
    """Watches the other ranks on a connection to each. `failure` is the first error that is known, or None.

    exit_reason: why the process of a rank has ended, if that can be known
    is_over: an error has ended the run, of this rank or of another one
    """

    def __init__(self, rank: int, links: dict[int, socket.socket], exit_reason: Callable[[int], str] = lambda rank: ""):
        super().__init__(daemon=True)
        self.failure: RankError | None = None
        self._links, self._peers, self._exit_reason = dict(links), list(links.values()), exit_reason
        self._heard = dict.fromkeys(links, time.monotonic())
        self._text = dict.fromkeys(links, "")
        self.is_over = False
        self.start()

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self.failure is not None:
            self.is_over = True
            raise self.failure

    def fail(self, text: str, code: int) -> None:
        """Tells all others of an error of this rank, unless one is known."""
        if not self.is_over:
            self.is_over = True
            self._send(json.dumps([text, code]))

    def close(self) -> None:
        """Tells all others that this rank has done its work."""
        self._send(BYE)

    def run(self) -> None:
        last = time.monotonic()
        while self._links:
            poll = select.poll()  # select takes no descriptor above 1023
            for link in self._links.values():
                if link.fileno() < 0:  # another thread has closed it
                    return
                poll.register(link, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(1e3 * HEARTBEAT_SECONDS)}
            now = time.monotonic()
            if now - last > 5 * HEARTBEAT_SECONDS:  # this process was stopped: heartbeats are still in the sockets
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            for rank in [r for r, link in self._links.items() if link.fileno() in ready]:
                self._read(rank, now)
            for rank in [r for r in self._links if now - self._heard[r] > TIMEOUT_SECONDS]:
                text = f"it has not answered for {TIMEOUT_SECONDS:.0f} s:"
                text += " its process is stopped, or its machine is unreachable"
                self._set_failure(RankError(rank, text, 1, is_gone=True))
            self._send("")

    def _read(self, rank: int, now: float) -> None:
        try:
            raw = self._links[rank].recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw:
            del self._links[rank]
            self._set_failure(RankError(rank, self._exit_reason(rank) or "its process has ended", 1, is_gone=True))
            return
        self._heard[rank] = now
        *lines, self._text[rank] = (self._text[rank] + raw.decode()).split("\n")
        for line in filter(None, lines):
            if line == BYE:
                self._links.pop(rank, None)
            else:
                self._set_failure(RankError(rank, *json.loads(line)))

    def _set_failure(self, failure: RankError) -> None:
        if self.failure is None:
            self.failure = failure

    def _send(self, line: str) -> None:
        for link in self._peers:
            try:
                link.send(line.encode() + b"\n")
            except OSError:  # gone, which reading tells, or stopped for long
                pass
