"""startup: `open_comm` finds out which rank this process is, and connects it to the others.

A command starts its own ranks with --ranks, or a launcher does: torchrun, mpiexec, srun. Or each rank is started by
hand, with its number and a rendezvous.
"""

import atexit
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.backends.ranks.launchers import RankInfo, from_environment
from handgrad.backends.ranks.mesh import MEET_SECONDS, Listener, connect
from handgrad.backends.ranks.mpi import has_mpi4py, open_mpi
from handgrad.backends.ranks.processes import RANK_VARIABLE, RankProcesses
from handgrad.backends.ranks.rendezvous import LOOPBACK, listen, meet
from handgrad.backends.ranks.sockets import CHANNELS, Sockets
from handgrad.backends.ranks.watch import Watch
from handgrad.core import limits
from handgrad.core.errors import HandgradError

_opened: list[Comm] = []


@dataclass(frozen=True)
class RanksRequest:
    """The ranks that a command line requests; all zeros and "": none.

    ranks              of the run
    rank               which of them this process is; None: it starts all of them on this machine, as rank 0
    ranks_per_machine  0: all are on one
    rendezvous         where they meet: "HOST:PORT" of rank 0, or a file that all of them see
    argv               the command, which the other ranks repeat
    """

    ranks: int = 0
    rank: int | None = None
    ranks_per_machine: int = 0
    rendezvous: str = ""
    argv: Sequence[str] = ()


def open_comm(request: RanksRequest = RanksRequest()) -> Comm:
    """The ranks of this process, found at the first call: `Alone` unless the command line requests several or a
    launcher has started them.

    Raises HandgradError where both have, or ranks do not find each other.
    """
    if not _opened:
        _opened.append(_open(request, os.environ))
    return _opened[0]


def _open(request: RanksRequest, env: Mapping[str, str]) -> Comm:
    if RANK_VARIABLE in env:
        return _join(env[RANK_VARIABLE])
    info = from_environment(env)
    if request.ranks_per_machine and request.rank is None:
        raise HandgradError("ranks", "--ranks-per-machine goes with --rank", "no --rank", hint="--rank, --rendezvous")
    if request.ranks > 0 or request.rank is not None:
        if info is not None and info.world > 1:
            rule = f"{info.launcher} has started {info.world} ranks, and the command line starts ranks, too"
            raise HandgradError("ranks", rule, hint="leave out --ranks and --rank, or the launcher")
    if request.ranks > 1 or request.rank is not None:
        if request.rank is None:
            if request.rendezvous:
                rule = "--rendezvous needs --rank, or a launcher"
                raise HandgradError("ranks", rule, hint="--rank, from 0 to --ranks - 1")
            return start(request.ranks, request.argv)
        info = from_flags(request)
    elif request.rendezvous and (info is None or info.world == 1):
        raise HandgradError("ranks", "--rendezvous needs several ranks", hint="--ranks, --rank")
    if info is None or info.world == 1:
        return Alone()
    if info.launcher in ("MPICH", "Open MPI") and not request.rendezvous and has_mpi4py():
        return open_mpi(info.world, info.local_rank, info.local_world)
    info = replace(info, rendezvous=request.rendezvous or info.rendezvous)
    if not info.rendezvous:
        rule = f"{info.launcher} has started {info.world} ranks, and nothing says where they meet"
        raise HandgradError("ranks", rule, hint="--rendezvous HOST:PORT of rank 0, or a file that all see")
    return open_sockets(info)


def from_flags(request: RanksRequest) -> RankInfo:
    """The rank that a command line with --rank names."""
    rank, world, per_machine = request.rank, request.ranks, request.ranks_per_machine or request.ranks
    if not world:
        raise HandgradError("ranks", "--rank goes with --ranks, how many there are", "no --ranks")
    if rank is None or not 0 <= rank < world:
        raise HandgradError("ranks", f"--rank is one of 0 to {world - 1}, below --ranks {world}", rank)
    if per_machine > world:
        raise HandgradError("ranks", f"--ranks-per-machine is at most --ranks {world}", per_machine)
    if request.rendezvous and world == 1:
        raise HandgradError("ranks", "--rendezvous needs several ranks", hint="--ranks")
    if not request.rendezvous and world > 1:
        hint = "--rendezvous HOST:PORT of rank 0, or a file that all see"
        raise HandgradError("ranks", "--rank needs --rendezvous", hint=hint)
    local_rank = rank % per_machine
    local_world = min(per_machine, world - (rank - local_rank))
    return RankInfo("by hand", rank, world, local_rank, local_world, request.rendezvous)


def start(world: int, argv: Sequence[str]) -> Comm:
    """This process as rank 0, and the others as processes that repeat the command on this machine."""
    cores = limits.cores()
    if world > cores:
        note = f"note: {world} ranks share {cores} core{'s' * (cores > 1)}, and each gets one thread"
        with suppress(OSError):  # nobody reads it
            print(note, file=sys.stderr, flush=True)
    listener, run = Listener(LOOPBACK), secrets.token_hex(8)
    others = RankProcesses(world, listener.port, run, argv)
    info = RankInfo("handgrad", 0, world, 0, world, f"{LOOPBACK}:{listener.port}", run)
    try:
        return open_sockets(info, listener, others.exit_reason, others.first_exit)
    except BaseException:
        others.kill()
        raise


def _join(variable: str) -> Comm:
    """This process as a rank that `start` has started. Raises SystemExit for an error that another rank prints."""
    *numbers, run = variable.split()
    rank, world, port, parent = map(int, numbers)
    info = RankInfo("handgrad", rank, world, rank, world, f"{LOOPBACK}:{port}", run)

    def parent_exit() -> str:
        return "" if os.getppid() == parent else "rank 0: its process has ended"

    try:
        return open_sockets(info, listen(rank, info.rendezvous), first_exit=parent_exit)
    except HandgradError:
        if rank == 1 and parent_exit():
            raise
        raise SystemExit(2) from None


def open_sockets(
    info: RankInfo,
    listener: Listener | None = None,
    exit_reason: Callable[[int], str] = lambda rank: "",
    first_exit: Callable[[], str] = lambda: "",
) -> Sockets:
    """The ranks, connected by TCP. exit_reason: as in `Watch`; first_exit: as in `meet`."""
    deadline = time.monotonic() + MEET_SECONDS
    listener = listener or listen(info.rank, info.rendezvous)
    peers, token = meet(info.rank, info.world, info.rendezvous, info.run, listener, deadline, first_exit)
    links = connect(info.rank, peers, token, listener, CHANNELS, deadline)
    listener.close()
    watch = Watch(info.rank, {r: link for (r, channel), link in links.items() if channel == "watch"}, exit_reason)
    comm = Sockets(info.rank, info.world, links, watch)
    comm.local_world, comm.local_rank = info.local_world, info.local_rank
    atexit.register(comm.close)
    sys.excepthook = comm.reporting_excepthook(sys.excepthook)
    return comm
