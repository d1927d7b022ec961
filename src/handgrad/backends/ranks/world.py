"""world: the ranks that this process belongs to, however they were started.

A command starts its own with --ranks, or a launcher has: torchrun, mpiexec, srun. Or each is started by hand, with its
number and a rendezvous.
"""

import atexit
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.backends.ranks.mesh import LIMIT, Listener, connect
from handgrad.backends.ranks.mpi import has_mpi4py, open_mpi
from handgrad.backends.ranks.rendezvous import LOOPBACK, listen, meet, nobody, same_machine
from handgrad.backends.ranks.sockets import CHANNELS, Sockets
from handgrad.backends.ranks.watch import Watch
from handgrad.core.errors import HandgradError

OWN = "HANDGRAD_RANK"  # by which a rank that `start` has started knows what it is
END = 5.0  # seconds that other ranks of this machine have to end after rank 0
_OPEN: list[Comm] = []


@dataclass(frozen=True)
class Place:
    """What one of several ranks knows of its start.

    by     who has started it
    where  where ranks meet, as in `rendezvous.meet`; "": that cannot be known
    run    a name of the run
    """

    by: str
    rank: int
    world: int
    local_rank: int
    local: int
    where: str = ""
    run: str = ""


@dataclass(frozen=True)
class Asked:
    """The ranks that a command line asks for; all zeros and "": it does not.

    ranks        of the run
    rank         which of them this process is; None: it starts all of them on this machine, as rank 0
    per_machine  ranks on each machine, 0: all
    rendezvous   where they meet: "HOST:PORT" of rank 0, or a file that all of them see
    argv         the command, which the other ranks repeat
    """

    ranks: int = 0
    rank: int | None = None
    per_machine: int = 0
    rendezvous: str = ""
    argv: Sequence[str] = ()


def open_comm(asked: Asked = Asked()) -> Comm:
    """The ranks of this process, found at the first call: `Alone` unless the command line asks for several or a
    launcher has started them.

    Raises HandgradError where both have, or ranks do not find each other.
    """
    if not _OPEN:
        _OPEN.append(_open(asked, os.environ))
    return _OPEN[0]


def _open(asked: Asked, env: Mapping[str, str]) -> Comm:
    if OWN in env:
        return _started(env[OWN])
    place = launched(env)
    if asked.per_machine and asked.rank is None:
        raise HandgradError("ranks", "--ranks-per-machine goes with --rank", "no --rank", hint="--rank, --rendezvous")
    if asked.ranks > 0 or asked.rank is not None:
        if place is not None and place.world > 1:
            rule = f"{place.by} has started {place.world} ranks, and the command line starts ranks, too"
            raise HandgradError("ranks", rule, hint="leave out --ranks and --rank, or the launcher")
    if asked.ranks > 1 or asked.rank is not None:
        if asked.rank is None:
            if asked.rendezvous:
                rule = "--rendezvous needs --rank, or a launcher"
                raise HandgradError("ranks", rule, hint="--rank, from 0 to --ranks - 1")
            return start(asked.ranks, asked.argv)
        place = by_hand(asked)
    elif asked.rendezvous and (place is None or place.world == 1):
        raise HandgradError("ranks", "--rendezvous needs several ranks", hint="--ranks, --rank")
    if place is None or place.world == 1:
        return Alone()
    if place.by in ("MPICH", "Open MPI") and not asked.rendezvous and has_mpi4py():
        return open_mpi(place.world, place.local_rank, place.local)
    where = asked.rendezvous or place.where
    if not where:
        rule = f"{place.by} has started {place.world} ranks, and nothing says where they meet"
        raise HandgradError("ranks", rule, hint="--rendezvous HOST:PORT of rank 0, or a file that all see")
    return open_sockets(Place(place.by, place.rank, place.world, place.local_rank, place.local, where, place.run))


def by_hand(asked: Asked) -> Place:
    """What the command line says of one rank."""
    rank, world, local = asked.rank, asked.ranks, asked.per_machine or asked.ranks
    if not world:
        raise HandgradError("ranks", "--rank goes with --ranks, how many there are", "no --ranks")
    if rank is None or not 0 <= rank < world:
        raise HandgradError("ranks", f"--rank is one of 0 to {world - 1}, below --ranks {world}", rank)
    if local > world:
        raise HandgradError("ranks", f"--ranks-per-machine is at most --ranks {world}", local)
    if asked.rendezvous and world == 1:
        raise HandgradError("ranks", "--rendezvous needs several ranks", hint="--ranks")
    if not asked.rendezvous and world > 1:
        hint = "--rendezvous HOST:PORT of rank 0, or a file that all see"
        raise HandgradError("ranks", "--rank needs --rendezvous", hint=hint)
    return Place("by hand", rank, world, rank % local, min(local, world - rank // local * local), asked.rendezvous)


def launched(env: Mapping[str, str]) -> Place | None:
    """What the variables of a launcher say; None without one. The innermost goes first: torchrun, mpiexec, srun.

    Slurm sets variables for a batch script, too, in which one process runs: only those of a step count.
    """
    slurm, mpich = _slurm(env), _mpich(env)
    if slurm and mpich and "MPI_LOCALRANKID" not in env and (slurm.rank, slurm.world) == (mpich.rank, mpich.world):
        mpich = None  # srun --mpi=pmi2 sets these: Slurm knows the machines
    found = [place for place in (_torchrun(env), _openmpi(env), mpich, slurm) if place is not None]
    mpis = [place for place in found if place.by in ("MPICH", "Open MPI")]
    if len({(place.rank, place.world) for place in mpis}) > 1:
        told = " and ".join(f"{place.by}: rank {place.rank} of {place.world}" for place in mpis)
        raise HandgradError("ranks", "one launcher has started this process", told, hint="unset the other's variables")
    return found[0] if found else None


def _numbers(env: Mapping[str, str], names: str) -> list[int] | None:
    """The values of variables; None unless all are there. Raises HandgradError for what is no number."""
    words = names.split()
    if not all(name in env for name in words):
        return None
    for name in words:
        if not env[name].isdigit():
            raise HandgradError("ranks", f"{name} is a number", repr(env[name]))
    return [int(env[name]) for name in words]


def _torchrun(env: Mapping[str, str]) -> Place | None:
    found = _numbers(env, "RANK WORLD_SIZE")
    if found is None:
        return None
    rank, world = found
    local_rank, local = _numbers(env, "LOCAL_RANK LOCAL_WORLD_SIZE") or (rank, world)
    (port,) = _numbers(env, "MASTER_PORT") or (0,)
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens at the port
    where = f"{env['MASTER_ADDR']}:{port}" if port and "MASTER_ADDR" in env else ""
    return Place("torchrun", rank, world, local_rank, local, where, env.get("TORCHELASTIC_RUN_ID", ""))


def _openmpi(env: Mapping[str, str]) -> Place | None:
    found = _numbers(env, "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE")
    local = _numbers(env, "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE")
    return _mpi("Open MPI", found and [*found, *(local or found)])


def _mpich(env: Mapping[str, str]) -> Place | None:
    found = _numbers(env, "PMI_RANK PMI_SIZE")
    return _mpi("MPICH", found and [*found, *(_numbers(env, "MPI_LOCALRANKID MPI_LOCALNRANKS") or found)])


def _mpi(by: str, found: list[int] | None) -> Place | None:
    if found is None:
        return None
    rank, world, local_rank, local = found
    return Place(by, rank, world, local_rank, local, same_machine(world) if local == world else "")


def _slurm(env: Mapping[str, str]) -> Place | None:
    found = _numbers(env, "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_ID")
    if found is None:
        return None
    rank, world, local_rank, job, step = found
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    host = first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
    where = f"{host}:{61440 + (job + step) % 4096}"  # above the ports that systems give out
    return Place("Slurm", rank, world, local_rank, int(tasks[0]) if tasks else world, where, f"{job}.{step}")


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts.

    >>> first_host("node[003-015,020],login1"), first_host("a1,a2"), first_host("gpu-[7,9]-ib")
    ('node003', 'a1', 'gpu-7-ib')
    """
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


# connecting and starting ----------------------------------------------------------------------------------------------


def open_sockets(
    place: Place,
    listener: Listener | None = None,
    fate: Callable[[int], str] = lambda rank: "",
    lost: Callable[[], str] = nobody,
) -> Sockets:
    """The ranks of a place, connected. fate: as in `Watch`; lost: as in `meet`."""
    end = time.monotonic() + LIMIT
    listener = listener or listen(place.rank, place.where)
    peers, token = meet(place.rank, place.world, place.where, place.run, listener, end, lost)
    links = connect(place.rank, peers, token, listener, CHANNELS, end)
    listener.close()
    watch = Watch(place.rank, {r: link for (r, channel), link in links.items() if channel == "watch"}, fate)
    comm = Sockets(place.rank, place.world, links, watch)
    comm.local, comm.local_rank = place.local, place.local_rank
    atexit.register(comm.close)
    sys.excepthook = comm.telling(sys.excepthook)
    return comm


def _started(told: str) -> Comm:
    """This process as one that `start` has started. Raises SystemExit for an error that another rank prints."""
    rank, world, port, parent = map(int, told.split()[:4])
    place = Place("handgrad", rank, world, rank, world, f"{LOOPBACK}:{port}", told.split()[4])

    def lost() -> str:
        return "" if os.getppid() == parent else "rank 0: its process has ended"

    try:
        return open_sockets(place, listen(rank, place.where), lost=lost)
    except HandgradError:
        if rank == 1 and lost():
            raise
        raise SystemExit(2) from None


def start(world: int, argv: Sequence[str]) -> Comm:
    """This process as rank 0, and the others, which repeat the command, as processes of their own on this machine."""
    listener, run = Listener(LOOPBACK), secrets.token_hex(8)
    where = f"{LOOPBACK}:{listener.port}"
    others: dict[int, subprocess.Popen] = {}
    for rank in range(1, world):
        env = os.environ | {OWN: f"{rank} {world} {listener.port} {os.getpid()} {run}"}
        command = [sys.executable, "-P", "-m", "handgrad.cli", *argv]
        others[rank] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)
    atexit.register(_end, others)

    def lost() -> str:
        ends = ((rank, _fate(others, rank, 0.0)) for rank in others)
        return next((f"rank {rank}: {end}" for rank, end in ends if end), "")

    place = Place("handgrad", 0, world, 0, world, where, run)
    try:
        return open_sockets(place, listener, partial(_fate, others), lost)
    except BaseException:
        for process in others.values():
            process.kill()
        raise


def _fate(others: Mapping[int, subprocess.Popen], rank: int, seconds: float = 1.0) -> str:
    """How the process of a rank has ended, if it does within so many seconds."""
    try:
        code = others[rank].wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return ""
    return f"its process was ended by signal {-code}" if code < 0 else f"its process has ended with exit code {code}"


def state(number: int) -> str:
    """The state of a process as Linux names it, such as "T" for a stopped one."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]


def _end(others: Mapping[int, subprocess.Popen]) -> None:
    """Waits for the other ranks of this machine, and ends those that hang or are stopped."""
    end = time.monotonic() + END
    for process in others.values():
        if process.poll() is None and state(process.pid) == "T":
            process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(end - time.monotonic(), 0.0))
    for process in others.values():
        if process.poll() is None:
            process.kill()
            process.wait()
