"""rendezvous: ranks that were started apart find each other, at an address of rank 0 or by a file that all of them see.

Each rank tells rank 0 where it listens, and gets the addresses of all. An error of rank 0 reaches everyone who asks.
"""

import json
import re
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from handgrad.backends.ranks.mesh import MEET_SECONDS, POLL_SECONDS, RETRY_SECONDS, Listener, Peer, addresses, ask, send
from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError
from handgrad.core.install import own_version

LOOPBACK = "127.0.0.1"
NOTE_SECONDS = 5.0  # a rank waits before it says what for
FirstExit = Callable[[], str]  # what is known of a process that has ended; "" while none has
Table = tuple[list[Peer], str]  # where every rank listens; what only the ranks of this run know


def meet(
    rank: int, world: int, where: str, run: str, listener: Listener, deadline: float, first_exit: FirstExit = lambda: ""
) -> Table:
    """Where all ranks listen. Raises HandgradError, at the deadline, if one does not come.

    where: "HOST:PORT", at which rank 0 listens, or the path of a file that rank 0 writes
    run: a name of this run; ranks of another one are turned away
    first_exit: a rank whose process has ended is not waited for
    """
    if rank == 0:
        return _lead(world, where, run, listener, deadline, first_exit)
    hello = {"run": run, "rank": rank, "world": world, "port": listener.port, "hosts": addresses()}
    hello["version"] = own_version()
    answer, host = _ask(hello, where, deadline, first_exit)
    if "error" in answer:
        raise HandgradError("ranks", answer["error"])
    (hosts, port), *others = answer["peers"]
    return [Peer([host, *hosts], port), *(Peer(*other) for other in others)], answer["run"]  # it was reached at `host`


def listen(rank: int, where: str) -> Listener:
    """The listener of a rank that `meet` takes. Raises HandgradError if rank 0 cannot have the port."""
    if re.fullmatch(r"[^/]*:[^/]*", where) and not address(where):
        raise HandgradError("ranks", "--rendezvous is HOST:PORT, with a port of 1 to 65535, or a file", f"'{where}'")
    host, port = address(where) or ("", 0)
    own = LOOPBACK if host in (LOOPBACK, "localhost") else ""
    try:
        return Listener(own, port if rank == 0 else 0)
    except OSError as error:
        rule = f"rank 0 cannot listen at port {port}: {error.strerror}"
        raise HandgradError("ranks", rule, hint="another port in --rendezvous HOST:PORT") from None


def address(where: str) -> tuple[str, int] | None:
    """The host and port of "HOST:PORT"; None for anything else, a path."""
    host, colon, port = where.rpartition(":")
    return (host.strip("[]"), int(port)) if colon and host and port.isdigit() and 0 < int(port) < 1 << 16 else None


def place(where: str) -> str:
    """Where ranks meet, in words."""
    return where if address(where) else f"the file '{where}'"


class WaitNote:
    """Prints once what a rank waits for and how much longer it will, when it has waited for `NOTE_SECONDS`."""

    def __init__(self, deadline: float):
        self._deadline, self._at, self._is_shown = deadline, time.monotonic() + NOTE_SECONDS, False

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now > self._at and not self._is_shown:
            self._is_shown = True
            with suppress(OSError):  # nobody reads it
                print(f"{text}, for at most {self._deadline - now:.0f} s more", file=sys.stderr, flush=True)


def _lead(world: int, where: str, run: str, listener: Listener, deadline: float, first_exit: FirstExit) -> Table:
    """Rank 0: waits for all others, and tells each where all listen."""
    token = secrets.token_hex(8)
    own = [addresses(), listener.port]
    file = None if address(where) else Path(where)
    if file is not None:
        write_text(file, json.dumps({"hosts": own[0], "port": own[1]}))
    waiting: dict[int, tuple[socket.socket, list]] = {}
    refused: list[socket.socket] = []
    note = WaitNote(deadline)
    try:
        error = ""
        while len(waiting) < world - 1 and not error:
            try:
                connection, hello = listener.accept(min(deadline, time.monotonic() + POLL_SECONDS))
            except TimeoutError:
                note.show(f"rank 0 waits at {place(where)} for {world - 1 - len(waiting)} of {world} ranks")
                error = first_exit()
                if not error and time.monotonic() >= deadline:
                    missing = ", ".join(str(r) for r in range(1, world) if r not in waiting)
                    error = f"all {world} ranks come to {place(where)} within {MEET_SECONDS:.0f} s"
                    error += f", but these have not: {missing}"
                continue
            if hello.get("run") != run or not isinstance(hello.get("rank"), int):
                with connection:
                    _send(connection, {"another run": run})
                continue
            _drop_disconnected(waiting)
            error = _mistake(hello, world, waiting)
            if error:
                refused.append(connection)
            else:
                waiting[hello["rank"]] = connection, [hello.get("hosts"), hello.get("port")]
        peers = [own, *(waiting[r][1] for r in sorted(waiting))]
        for connection in [*(connection for connection, _ in waiting.values()), *refused]:
            with connection:
                _send(connection, {"error": error} if error else {"peers": peers, "run": token})
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    if error:
        raise HandgradError("ranks", error)
    return [Peer(*peer) for peer in peers], token


def _mistake(hello: dict[str, Any], world: int, waiting: dict[int, Any]) -> str:
    """What is wrong with a rank that has come, if anything."""
    rank = hello["rank"]
    if hello.get("world") != world:
        return f"rank 0 is one of {world} ranks, and rank {rank} one of {hello.get('world')}"
    if not 0 < rank < world or rank in waiting:
        return f"every rank has a number of its own below {world}, but two have {rank}"
    if hello.get("version") != own_version():
        return f"all ranks run handgrad {own_version()}, but rank {rank} runs {hello.get('version')}"
    return ""


def _drop_disconnected(waiting: dict[int, tuple[socket.socket, list]]) -> None:
    """Drops ranks that have ended: they may have been started again. A rank that waits sends nothing, so what can be
    read is the end of its connection."""
    for rank, (connection, _) in list(waiting.items()):
        if select.select([connection], [], [], 0)[0]:
            connection.close()
            del waiting[rank]


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    with suppress(OSError):  # it has given up, which all will see when they connect
        send(connection, answer)


def _ask(hello: dict[str, Any], where: str, deadline: float, first_exit: FirstExit) -> tuple[dict, str]:
    """The answer of rank 0, and the host at which it was reached."""
    got, note = "no answer", WaitNote(deadline)
    while time.monotonic() < deadline and not first_exit():
        for at in _addresses(where):

            def waits(at: tuple[str, int] = at) -> bool:
                """Whether rank 0 may be what was asked: a file of an earlier run is written anew."""
                return time.monotonic() < deadline and at in _addresses(where) and not first_exit()

            answered = ask(*at, hello, waits)
            if answered is not None:
                answered[0].close()
                if answered[1].keys() & {"peers", "error"}:
                    return answered[1], at[0]
                got = "rank 0 of another run"
        note.show(f"rank {hello['rank']} waits for rank 0 at {place(where)}")
        time.sleep(RETRY_SECONDS)
    if first_exit():
        raise HandgradError("ranks", first_exit())
    rule = f"rank 0 answers at {where} within {MEET_SECONDS:.0f} s" if address(where) else f"rank 0 writes '{where}'"
    hint = "is rank 0 running, and is --rendezvous the same for all?"
    raise HandgradError("ranks", rule, got, hint=hint)


def _addresses(where: str) -> Iterator[tuple[str, int]]:
    """Where rank 0 may listen. A file of an earlier run may lie there still: nobody answers at what it names."""
    at = address(where)
    if at is not None:
        yield at
        return
    try:
        found = json.loads(Path(where).read_text())
        yield from ((host, found["port"]) for host in found["hosts"])
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return
