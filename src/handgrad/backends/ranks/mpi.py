"""mpi: ranks are processes that mpiexec has started. MPI moves bytes; comm.py adds them up, and watch.py tells of
failures.

If a process dies, mpiexec ends all others.
"""

import atexit
import importlib.util
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from handgrad.backends.ranks.comm import LAST_EXCHANGE_SECONDS, Comm
from handgrad.backends.ranks.mesh import MEET_SECONDS, Listener, Peer, addresses, connect
from handgrad.backends.ranks.watch import Watch
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command

SPIN_POLLS = 200  # of a message before the first sleep: some 50 us
SLEEP_SECONDS = 50e-6  # between polls from then on


def has_mpi4py() -> bool:
    """Whether mpi4py is installed."""
    return importlib.util.find_spec("mpi4py") is not None


def open_mpi(world: int, local_rank: int, local_world: int) -> "Mpi":
    """The ranks that mpiexec has started. Raises HandgradError if mpi4py uses another MPI library than mpiexec."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # after an error it would wait for ranks that have ended
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        rule = f"mpiexec has started {world} ranks, and mpi4py does not load: {error}"
        raise HandgradError("mpi", rule, hint=f"{install_command('mpi')} brings both it and mpiexec") from None
    if MPI.COMM_WORLD.size != world:
        rule = f"mpiexec has started {world} ranks, and mpi4py uses its MPI library"
        hint = f"the mpiexec of the same library: that of {install_command('mpi')} is in the bin folder of its Python"
        found = f"{MPI.Get_library_version().split()[0]}, which sees {MPI.COMM_WORLD.size}"
        raise HandgradError("mpi", rule, found, hint=hint)
    comm = Mpi(MPI, MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup())
    comm.local_world, comm.local_rank = local_world, local_rank
    comm.open_watch()
    atexit.register(comm.close)
    sys.excepthook = comm.reporting_excepthook(sys.excepthook)
    return comm


class Mpi(Comm):
    """A rank that is a process.

    data, last: communicators for what is exchanged, and for the exchange after an error
    """

    def __init__(self, MPI: Any, data: Any, last: Any, limit: float = 0.0):
        self._MPI, self._data, self._last, self._limit = MPI, data, last, limit
        self.rank, self.world = data.rank, data.size
        self._kept: list[Any] = []  # arrays and requests of messages that nobody may receive any more

    def open_watch(self) -> None:
        """Connects the ranks by TCP, too, for failures: MPI tells of none."""
        listener, deadline = Listener(), time.monotonic() + MEET_SECONDS
        listeners = self.all_gather_object([addresses(), listener.port, secrets.token_hex(8)])
        peers, run = [Peer(hosts, port) for hosts, port, _ in listeners], listeners[0][2]
        links = connect(self.rank, peers, run, listener, ("watch",), deadline)
        listener.close()
        self.watch = Watch(self.rank, {r: link for (r, _), link in links.items()})

    def all_to_all(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        others = [(self.rank + k) % self.world for k in range(1, self.world)]
        requests = [self._data.Irecv([receive[r], self._MPI.BYTE], r) for r in others if receive[r].size]
        requests += [self._data.Isend([send[r], self._MPI.BYTE], r) for r in others if send[r].size]
        try:
            self._wait(requests)
        except HandgradError:
            self._kept.append((requests, send, receive))
            raise

    def _wait(self, requests: list[Any]) -> None:
        begin, polls = time.monotonic(), 0
        while not self._MPI.Request.Testall(requests):
            polls += 1
            if polls > SPIN_POLLS:
                self.check()
                time.sleep(SLEEP_SECONDS)
                if self._limit and time.monotonic() - begin > self._limit:
                    raise HandgradError("ranks", f"a rank has not answered for {self._limit:.0f} s")

    def after_failure(self) -> Comm:
        return Mpi(self._MPI, self._last, self._last, LAST_EXCHANGE_SECONDS)

    def close(self) -> None:
        """Ends MPI, unless a rank has failed: then the process just ends."""
        if self.watch is not None and not self.watch.is_over:
            self.watch.close()
            self._MPI.Finalize()
