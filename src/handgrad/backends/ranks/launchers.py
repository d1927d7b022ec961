"""launchers: what the variables of torchrun, Slurm, MPICH and Open MPI say of the rank that this process is."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from handgrad.backends.ranks.processes import process_stat
from handgrad.core.errors import HandgradError


@dataclass(frozen=True)
class RankInfo:
    """What one of several ranks knows at its start.

    launcher     what has started it
    local_rank   its number among the local_world ranks of its machine
    rendezvous   where ranks meet, as in `rendezvous.meet`; "": the launcher does not say
    run          a name of the run
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    rendezvous: str = ""
    run: str = ""


def from_environment(env: Mapping[str, str]) -> RankInfo | None:
    """The rank by the variables of a launcher; None without one. The innermost goes first: torchrun, mpiexec, srun.

    Slurm sets variables for a batch script, too, in which one process runs: only those of a step count.
    """
    slurm, mpich = _slurm(env), _mpich(env)
    if slurm and mpich and "MPI_LOCALRANKID" not in env and (slurm.rank, slurm.world) == (mpich.rank, mpich.world):
        mpich = None  # srun --mpi=pmi2 sets these: Slurm knows the machines
    found = [info for info in (_torchrun(env), _open_mpi(env), mpich, slurm) if info is not None]
    mpis = [info for info in found if info.launcher in ("MPICH", "Open MPI")]
    if len({(info.rank, info.world) for info in mpis}) > 1:
        got = " and ".join(f"{info.launcher}: rank {info.rank} of {info.world}" for info in mpis)
        raise HandgradError("ranks", "one launcher has started this process", got, hint="unset the other's variables")
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


def _torchrun(env: Mapping[str, str]) -> RankInfo | None:
    found = _numbers(env, "RANK WORLD_SIZE")
    if found is None:
        return None
    rank, world = found
    local_rank, local_world = _numbers(env, "LOCAL_RANK LOCAL_WORLD_SIZE") or (rank, world)
    (port,) = _numbers(env, "MASTER_PORT") or (0,)
    port += env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens at the port
    rendezvous = f"{env['MASTER_ADDR']}:{port}" if port and "MASTER_ADDR" in env else ""
    return RankInfo("torchrun", rank, world, local_rank, local_world, rendezvous, env.get("TORCHELASTIC_RUN_ID", ""))


def _open_mpi(env: Mapping[str, str]) -> RankInfo | None:
    found = _numbers(env, "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE")
    local = _numbers(env, "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE")
    return _mpi("Open MPI", found and [*found, *(local or found)])


def _mpich(env: Mapping[str, str]) -> RankInfo | None:
    found = _numbers(env, "PMI_RANK PMI_SIZE")
    return _mpi("MPICH", found and [*found, *(_numbers(env, "MPI_LOCALRANKID MPI_LOCALNRANKS") or found)])


def _mpi(launcher: str, found: list[int] | None) -> RankInfo | None:
    if found is None:
        return None
    rank, world, local_rank, local_world = found
    rendezvous = local_file(world) if local_world == world else ""
    return RankInfo(launcher, rank, world, local_rank, local_world, rendezvous)


def _slurm(env: Mapping[str, str]) -> RankInfo | None:
    found = _numbers(env, "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_ID")
    if found is None:
        return None
    rank, world, local_rank, job, step = found
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    host = first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
    rendezvous = f"{host}:{61440 + (job + step) % 4096}"  # above the ports that systems give out
    return RankInfo("Slurm", rank, world, local_rank, int(tasks[0]) if tasks else world, rendezvous, f"{job}.{step}")


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts.

    >>> first_host("node[003-015,020],login1"), first_host("a1,a2"), first_host("gpu-[7,9]-ib")
    ('node003', 'a1', 'gpu-7-ib')
    """
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def local_file(world: int) -> str:
    """A file at which ranks of one launcher on this machine meet: it is named by their parent process."""
    parent = os.getppid()
    started = process_stat(parent)[19]  # when: a process number is used again
    folder = os.environ.get("TMPDIR", "/tmp")
    return f"{folder}/handgrad-{os.getuid()}-{parent}-{started}-{world}"
