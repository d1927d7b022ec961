"""mpi: ranks are processes that mpiexec has started. MPI moves bytes; comm.py adds them up.

While a rank waits it also listens for the error of another one, so that nobody waits for a rank that has ended. If a
process dies, mpiexec ends all others.
"""

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from handgrad.backends.comm import Alone, Comm, RankError
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command

_OPEN: list[Comm] = []
STARTED = (("PMI_SIZE", "MPI_LOCALNRANKS"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"))  # world, local
SPINS = 200  # looks at a message before the first sleep: some 50 us
SLEEP = 50e-6  # seconds between looks from then on
LAST_SECONDS = 20.0  # how long a rank waits for the others after an error


def open_comm() -> Comm:
    """The ranks of this process, found at first use: `Alone` unless mpiexec has started several.

    Raises HandgradError without mpi4py, or if it uses another MPI library than mpiexec.
    """
    if not _OPEN:
        sizes = [(int(os.environ[size]), os.environ.get(local)) for size, local in STARTED if size in os.environ]
        world, local = max(sizes, default=(1, None))
        _OPEN.append(_open(world, int(local or world)) if world > 1 else Alone())
    return _OPEN[0]


def _open(world: int, local: int) -> "Mpi":
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # after an error it would wait for ranks that have ended
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        rule = f"mpiexec has started {world} ranks, and they need mpi4py: {error}"
        raise HandgradError("mpi", rule, hint=f"{install_command('mpi')} brings both it and mpiexec") from None
    if MPI.COMM_WORLD.size != world:
        rule = f"mpiexec has started {world} ranks, and mpi4py uses its MPI library"
        hint = f"the mpiexec of the same library: that of {install_command('mpi')} is in the bin folder of its Python"
        found = f"{MPI.Get_library_version().split()[0]}, which sees {MPI.COMM_WORLD.size}"
        raise HandgradError("mpi", rule, found, hint=hint)
    comm = Mpi(MPI, MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup())
    comm.local = local
    atexit.register(comm.close)
    sys.excepthook = comm.telling(sys.excepthook)
    return comm


class Mpi(Comm):
    """A rank that is a process.

    data, errors, last: communicators for what is exchanged, for errors, and for the exchange after an error
    """

    def __init__(self, MPI: Any, data: Any, errors: Any, last: Any, limit: float = 0.0):
        self._MPI, self._data, self._errors, self._last, self._limit = MPI, data, errors, last, limit
        self.rank, self.world = data.rank, data.size
        self._kept: list[Any] = []  # arrays and requests of messages that nobody may receive any more
        self._is_over = False

    def swap(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        others = [(self.rank + k) % self.world for k in range(1, self.world)]
        requests = [self._data.Irecv([receive[r], self._MPI.BYTE], r) for r in others if receive[r].size]
        requests += [self._data.Isend([send[r], self._MPI.BYTE], r) for r in others if send[r].size]
        try:
            self._wait(requests)
        except HandgradError:
            self._kept.append((requests, send, receive))
            raise

    def _wait(self, requests: list[Any]) -> None:
        begin, looks = time.monotonic(), 0
        while not self._MPI.Request.Testall(requests):
            looks += 1
            if looks > SPINS:
                self._listen()
                time.sleep(SLEEP)
                if self._limit and time.monotonic() - begin > self._limit:
                    raise HandgradError("ranks", f"every rank answers within {self._limit:.0f} s")

    def _listen(self) -> None:
        if self._errors is not None and self._errors.Iprobe():
            status = self._MPI.Status()
            self._errors.Probe(status=status)
            message = bytearray(status.Get_count(self._MPI.BYTE))
            self._errors.Recv([message, self._MPI.BYTE], status.Get_source())
            text, code = json.loads(message)
            self._is_over = True
            raise RankError(status.Get_source(), text, code)

    def fail(self, text: str, code: int = 2) -> None:
        if self._is_over:  # all know
            return
        self._is_over = True
        message = json.dumps([text, code]).encode()
        requests = [self._errors.Isend([message, self._MPI.BYTE], r) for r in range(self.world) if r != self.rank]
        self._kept.append((requests, message))
        self._MPI.Request.Testall(requests)

    def after_failure(self) -> Comm:
        return Mpi(self._MPI, self._last, None, self._last, LAST_SECONDS)

    def telling(self, hook: Callable) -> Callable:
        """An excepthook that also tells the others of an error that ends this process."""

        def tell(kind: Any, error: Any, trace: Any) -> None:
            hook(kind, error, trace)
            self.fail(f"{kind.__name__}: {error}", 1)

        return tell

    def close(self) -> None:
        """Ends MPI, unless a rank has failed: then the process just ends."""
        if not self._is_over:
            self._MPI.Finalize()
