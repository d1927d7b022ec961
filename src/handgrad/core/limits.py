"""What this process may use of the machine: CPUs, threads and memory, by every limit that Linux sets.

A container sees the CPUs and the memory of its host; what it may use of them is in its control groups, version 1 or 2,
of which the outer ones count, too. `root` is where the system's files are: "/" except in tests.
"""

import math
import os
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

from handgrad.core.number import I64_MAX

Names = tuple[str, ...]

ROOT = Path("/")
V1_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes")
MAX_THREADS = 1024  # of a team: every kernel keeps scratch per thread, and no machine gains from more


def cpus(root: Path = ROOT) -> int:
    """Logical CPUs that this process may use: its affinity and the quotas of its groups, rounded up."""
    return min(len(os.sched_getaffinity(0)), _quota(root))


def cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use, by the same limits."""
    found = set()
    for cpu in os.sched_getaffinity(0):
        siblings = read_system_file(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.add(siblings.strip() or f"cpu{cpu}")
    return min(len(found), _quota(root))


def threads(root: Path = ROOT) -> int:
    """Threads that compute by default: one per physical core, at most OMP_NUM_THREADS."""
    wanted = re.fullmatch(r"\s*0*([1-9]\d*)\s*(,.*)?", os.environ.get("OMP_NUM_THREADS", ""))
    return min(cores(root), int(wanted[1]) if wanted else MAX_THREADS)


def startable(count: int) -> int:
    """Returns how many of `count` more threads can start. It starts them: no call tells. OpenMP aborts the process if
    one fails."""
    release, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        pass
    release.set()
    for thread in started:
        thread.join()
    return len(started)


def memory_limits(root: Path = ROOT) -> list[tuple[int, str]]:
    """(bytes that can still be allocated, the limit's name) of every limit on this process; the smallest one binds."""
    info = _fields(root / "proc/meminfo")
    found = [(info.get("MemAvailable", I64_MAX), "")]
    if read_system_file(root / "proc/sys/vm/overcommit_memory").strip() == "2" and "CommitLimit" in info:
        found.append((info["CommitLimit"] - info.get("Committed_AS", 0), "vm.overcommit_memory is 2"))
    status = _fields(root / "proc/self/status")
    for kind, field, name in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append((soft - status.get(field, 0), name))
    for folder, names in _groups(root, "memory", ("memory.max", "memory.current"), V1_MEMORY):
        most, used = (_number(folder / name) for name in names)
        if most is not None and used is not None:
            lines = read_system_file(folder / "memory.stat").splitlines()
            stat = dict(line.split(" ", 1) for line in lines if " " in line)
            prefix = "total_" if "total_inactive_file" in stat else ""
            cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            found.append((most - used + cache, f"{names[0]} of the control group '{folder.name}'"))
    return [(max(free, 0), name) for free, name in found]


def _quota(root: Path) -> int:
    """CPUs by the smallest quota of the groups, rounded up: a quota of 1.5 CPUs gives 2 threads."""
    least = math.inf
    for folder, names in _groups(root, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        words = " ".join(read_system_file(folder / name) for name in names).split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # else "max" or -1: no quota
            least = min(least, int(words[0]) / int(words[1]))
    return MAX_THREADS if least == math.inf else max(math.ceil(least), 1)


def _groups(root: Path, controller: str, v2: Names, v1: Names) -> Iterator[tuple[Path, Names]]:
    """(folder, names of its files) of the groups of both versions that this process is in, from its own outwards."""
    mounts = _mounts(root)
    for line in read_system_file(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        is_v2 = number == "0" and not names
        if not is_v2 and controller not in names.split(","):
            continue
        for kind, options, inside, place in mounts:
            if (kind == "cgroup2") if is_v2 else (kind == "cgroup" and controller in options):
                # a container may see its host's path, mounted at its own group
                relative = os.path.relpath(path, inside)
                folder = place if relative.startswith("..") else place / relative
                while True:
                    yield folder, v2 if is_v2 else v1
                    if folder == place:
                        break
                    folder = folder.parent


def _mounts(root: Path) -> list[tuple[str, list[str], str, Path]]:
    """(type, options, path inside the hierarchy, where) of every mounted hierarchy of control groups."""
    found = []
    for line in read_system_file(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if len(words) > 4 and len(rest) > 2 and rest[0] in ("cgroup", "cgroup2"):
            found.append((rest[0], rest[2].split(","), words[3], root / words[4].lstrip("/")))
    return found


def read_system_file(path: Path) -> str:
    """The text of a file of the system; empty if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and where there is no file."""
    word = read_system_file(path).strip()
    return int(word) if word.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Fields in kB of a file of lines "name: number kB", in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", read_system_file(path), re.M)}
