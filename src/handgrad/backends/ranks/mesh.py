"""mesh: TCP connections between every two ranks, on one machine or on several.

Every rank listens, and connects to the ranks below it. What a connection is for is its channel. Both ends check that
the other one belongs to the same run: a port may be another program's by now.
"""

import fcntl
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from handgrad.core.errors import HandgradError

MEET_SECONDS = 28.0  # all ranks have to find each other
ATTEMPT_SECONDS = 2.0  # for an answer at one address
RETRY_SECONDS = 0.02  # between two attempts
POLL_SECONDS = 0.2  # between checks whether waiting still makes sense
MESSAGE_BYTES = 1 << 20  # of a message, at most
SIOCGIFADDR = 0x8915  # of linux/sockios.h: an interface's IPv4 address
Link = tuple[int, str]  # another rank, and the channel
Links = dict[Link, socket.socket]


@dataclass(frozen=True)
class Peer:
    """Where a rank listens: on one of these hosts, at this port."""

    hosts: Sequence[str]
    port: int


class Listener:
    """A socket at which other ranks arrive, while this rank does something else."""

    def __init__(self, host: str = "", port: int = 0):
        self._server = socket.create_server((host, port), backlog=1024)
        self.port = self._server.getsockname()[1]

    def accept(self, deadline: float) -> tuple[socket.socket, dict]:
        """The next connection, and its first message. Raises TimeoutError at the deadline."""
        while True:
            self._server.settimeout(seconds_left(deadline))
            connection, _ = self._server.accept()
            try:
                connection.settimeout(ATTEMPT_SECONDS)
                return connection, receive(connection)
            except (OSError, ValueError):  # no rank
                connection.close()

    def close(self) -> None:
        self._server.close()


def connect(
    rank: int, peers: Sequence[Peer], run: str, listener: Listener, channels: Sequence[str], deadline: float
) -> Links:
    """Connects this rank with all others, on every channel. Raises HandgradError, at the deadline, for a rank that
    does not answer.

    run: text that only the ranks of this run know
    """
    links: Links = {}
    expected = {(r, channel) for r in range(rank + 1, len(peers)) for channel in channels}

    def welcome() -> None:
        while expected - links.keys():
            try:
                connection, hello = listener.accept(deadline)
            except TimeoutError:
                return
            link = hello.get("rank"), hello.get("channel")
            if hello.get("run") == run and link in expected:
                send(connection, {"run": run, "rank": rank})
                links[link] = connection
            else:
                connection.close()

    thread = threading.Thread(target=welcome, daemon=True)
    thread.start()
    for r in range(rank):
        for channel in channels:
            links[r, channel] = _reach(peers[r], r, {"run": run, "rank": rank, "channel": channel}, deadline)
    thread.join(seconds_left(deadline) + 1)
    for r, _ in sorted(expected - links.keys()):
        raise HandgradError("ranks", f"rank {r} did not connect to rank {rank} within {MEET_SECONDS:.0f} s")
    for connection in links.values():
        prepare(connection)
    return links


def _reach(peer: Peer, rank: int, hello: dict[str, Any], deadline: float) -> socket.socket:
    """A connection to a rank that has answered as that rank of this run."""
    while True:
        for host in peer.hosts:
            answered = ask(host, peer.port, hello)
            if answered is not None:
                connection, answer = answered
                if answer == {"run": hello["run"], "rank": rank}:
                    return connection
                connection.close()
        if time.monotonic() > deadline:
            at = ", ".join(f"{host}:{peer.port}" for host in peer.hosts)
            rule = f"rank {rank} does not answer at any of {at}"
            raise HandgradError("ranks", rule, hint="a firewall between machines?")
        time.sleep(RETRY_SECONDS)


def ask(
    host: str, port: int, message: dict[str, Any], waits: Callable[[], bool] = lambda: False
) -> tuple[socket.socket, dict] | None:
    """A connection to what listens there, and its answer; None if there is none within `ATTEMPT_SECONDS`, which count
    once `waits` is false."""
    try:
        connection = socket.create_connection((host, port), ATTEMPT_SECONDS)
    except OSError:
        return None
    try:
        send(connection, message)
        while waits() and not select.select([connection], [], [], POLL_SECONDS)[0]:
            pass
        connection.settimeout(ATTEMPT_SECONDS)
        return connection, receive(connection)
    except (OSError, ValueError):
        connection.close()
        return None


def prepare(connection: socket.socket) -> None:
    """Sends small messages at once, and notices a host that is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def send(connection: socket.socket, message: Any) -> None:
    """Sends what JSON can hold."""
    raw = json.dumps(message).encode()
    connection.sendall(struct.pack("<I", len(raw)) + raw)


def receive(connection: socket.socket) -> dict:
    """A message of `send`. Raises OSError or ValueError for anything else."""
    (size,) = struct.unpack("<I", _exactly(connection, 4))
    message = json.loads(_exactly(connection, size)) if size <= MESSAGE_BYTES else None
    if not isinstance(message, dict):
        raise ValueError("no message of a rank")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    raw = b""
    while len(raw) < count:
        part = connection.recv(count - len(raw))
        if not part:
            raise OSError("the connection has ended")
        raw += part
    return raw


def seconds_left(deadline: float) -> float:
    """Seconds until a time, more than 0: a socket without a timeout waits for ever."""
    return max(deadline - time.monotonic(), 1e-3)


def addresses() -> list[str]:
    """The IPv4 addresses of this machine, loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without one
                request = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))
