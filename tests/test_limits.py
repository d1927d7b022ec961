"""What a process may use: CPU quotas and memory limits of both versions of control groups, resource limits, and threads
that cannot be started. The files of the system are made up; what binds must be named."""

import os
import resource
import subprocess
import sys
from importlib import import_module

import pytest

from handgrad.backends import arena, open_backend
from handgrad.core import limits
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.plan import plan
from handgrad.core.program import Program
from handgrad.ops import add

GIB = 1 << 30
V2 = "24 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 1 0:26 {inside} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "31 1 0:27 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 1 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes the files of a machine with 16 CPUs, two to a core, and 8 GiB available; returns its root."""
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(**files):
        known = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:    {8 << 20} kB\nHugePages_Total:  0\n"}
        for cpu in range(16):
            known[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 8},{cpu % 8 + 8}\n"
        for name, text in (known | files.pop("files", {}) | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def v2(group, **files):
    """The files of a machine with version 2, for a process in this group; names with __ for a folder."""
    found = {"proc/self/mountinfo": V2, "proc/self/cgroup": f"0::{group}\n"}
    return {"files": found | {f"sys/fs/cgroup/{name}": text for name, text in files.get("at", {}).items()}}


def test_a_machine_without_limits_has_its_cores_and_its_free_memory(machine):
    root = machine()
    assert (limits.cpus(root), limits.threads(root)) == (16, 8)
    assert limits.memory_limits(root) == [(8 * GIB, "")]


def test_limits_without_system_files(tmp_path, monkeypatch):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: {0, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (limits.cpus(tmp_path), limits.threads(tmp_path)) == (2, 2)
    assert min(limits.memory_limits(tmp_path))[0] > 0


@pytest.mark.parametrize(
    ("own", "outer", "count"),
    [
        ("max 100000", "max 100000", 16),
        ("200000 100000", "max 100000", 2),
        ("max 100000", "300000 100000", 3),  # the outer group binds
        ("400000 100000", "300000 100000", 3),
        ("300000 100000", "400000 100000", 3),
        ("150000 100000", "max 100000", 2),  # one and a half: rounded up
        ("5000 100000", "max 100000", 1),
        ("nonsense", "", 16),
        ("100000 0", "", 16),
    ],
)
def test_quotas_of_nested_groups_of_version_2(machine, own, outer, count):
    root = machine(**v2("/a/b", at={"a/b/cpu.max": own + "\n", "a/cpu.max": outer + "\n"}))
    assert limits.cpus(root) == count and limits.threads(root) == min(count, 8)


@pytest.mark.parametrize("inside", ["/", "/docker/x"])  # mounted whole, or at the container's own group
def test_quotas_of_version_1(machine, inside):
    files = {
        "proc/self/mountinfo": V1.format(inside=inside),
        "proc/self/cgroup": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n0::/\n",
    }
    folder = "sys/fs/cgroup/cpu,cpuacct" + ("/docker/x" if inside == "/" else "")
    files[f"{folder}/cpu.cfs_quota_us"], files[f"{folder}/cpu.cfs_period_us"] = "250000\n", "100000\n"
    folder = "sys/fs/cgroup/memory" + ("/docker/x" if inside == "/" else "")
    files[f"{folder}/memory.limit_in_bytes"], files[f"{folder}/memory.usage_in_bytes"] = f"{3 * GIB}\n", f"{2 * GIB}\n"
    files[f"{folder}/memory.stat"] = f"cache 5\ninactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 7\n"
    root = machine(files=files)
    assert limits.cpus(root) == limits.threads(root) == 3
    name = "x" if inside == "/" else "memory"
    assert min(limits.memory_limits(root)) == (
        GIB + GIB // 2 + 7,
        f"memory.limit_in_bytes of the control group '{name}'",
    )


def test_a_quota_of_minus_one_is_none(machine):
    files = {"proc/self/mountinfo": V1.format(inside="/"), "proc/self/cgroup": "4:cpu,cpuacct:/\n"}
    files["sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"] = "-1\n"
    files["sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us"] = "100000\n"
    assert limits.cpus(machine(files=files)) == 16


@pytest.mark.parametrize(
    ("text", "count"),
    [("3", 3), ("4,2", 4), (" 02 ", 2), ("99", 8), ("", 8), ("0", 8), ("-1", 8), ("two", 8), ("2x", 8)],
)
def test_openmps_variable(machine, monkeypatch, text, count):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert limits.threads(machine()) == count and limits.cpus(machine()) == 16


def test_memory_of_nested_groups(machine):
    """The inner group has 4 GiB, 1 of 6 GiB of the outer one are free: it binds, with the cache that can be dropped."""
    at = {
        "a/b/memory.max": f"{4 * GIB}\n",
        "a/b/memory.current": "0\n",
        "a/memory.max": f"{6 * GIB}\n",
        "a/memory.current": f"{5 * GIB}\n",
        "a/memory.stat": f"anon 1\nactive_file 4096\ninactive_file {GIB // 4}\n",
        "memory.max": "max\n",
    }
    found = limits.memory_limits(machine(**v2("/a/b", at=at)))
    assert sorted(found) == [
        (GIB + GIB // 4 + 4096, "memory.max of the control group 'a'"),
        (4 * GIB, "memory.max of the control group 'b'"),
        (8 * GIB, ""),
    ]


def test_memory_by_resource_limits_and_overcommit(machine, monkeypatch):
    most = {resource.RLIMIT_AS: 3 * GIB, resource.RLIMIT_DATA: 2 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (most[kind], resource.RLIM_INFINITY))
    root = machine(
        files={
            "proc/self/status": f"Name:\tx\nVmSize:\t {1 << 20} kB\nVmData:\t {1 << 18} kB\n",
            "proc/sys/vm/overcommit_memory": "2\n",
            "proc/meminfo": f"MemAvailable: {8 << 20} kB\nCommitLimit: {5 << 20} kB\nCommitted_AS: {6 << 20} kB\n",
        }
    )
    assert limits.memory_limits(root) == [
        (8 * GIB, ""),
        (0, "vm.overcommit_memory is 2"),
        (2 * GIB, "ulimit -v"),
        (GIB + GIB * 3 // 4, "ulimit -d"),
    ]


def test_an_arena_over_a_limit_is_refused_before_it_is_allocated_and_the_limit_named(monkeypatch):
    p = Program(F32)
    p.emit(add, p.input("a", (1 << 10, 1 << 10), F32), p.input("b", (1 << 10, 1 << 10), F32))
    monkeypatch.setattr(
        arena, "memory_limits", lambda: [(8 * GIB, ""), (4 << 20, "memory.max of the control group 'b'")]
    )
    monkeypatch.setattr(arena.mmap, "mmap", lambda *a, **k: pytest.fail("allocated"))
    line = (
        r"\[memory\] the arena fits in memory, 4 MiB are free \(memory.max of the control group 'b'\), but got 12 MiB"
    )
    with pytest.raises(HandgradError, match=line):
        open_backend("cpu").alloc(plan(p))


def limited(code, kind, soft):
    """Runs code in a process with a resource limit; returns it finished."""
    code = f"import resource; resource.setrlimit(resource.{kind}, ({soft}, resource.getrlimit(resource.{kind})[1]))\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


ALLOC = """
from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.plan import plan
from handgrad.core.program import Program
from handgrad.ops import add
p = Program(F32)
p.emit(add, p.input("a", (1 << 14, 1 << 14), F32), p.input("b", (1 << 14, 1 << 14), F32))
try:
    open_backend("cpu", 1).alloc(plan(p))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "name"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")])
def test_a_real_resource_limit_is_named(kind, name):
    done = limited(ALLOC, kind, 2 << 30)
    assert f"MiB are free ({name}), but got 3072 MiB" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("count", [limits.MAX_THREADS + 1, 100_000, 2**31, 2**62])
def test_a_team_of_very_many_threads_is_refused(count):
    """100000 threads ended the process with a segmentation fault."""
    with pytest.raises(
        HandgradError, match=rf"\[backend\] threads is at most 1024: .*, but got {count}\. hint: .* CPUs"
    ):
        open_backend("cpu", count)


@pytest.mark.parametrize("count", [True, 1.5, "2", 2**64])
def test_threads_are_a_count(count):
    with pytest.raises(HandgradError, match=r"\[backend\] threads is"):
        open_backend("cpu", count)


def test_the_largest_team_runs(one_pass, tiny):
    """The bound is one that works."""
    want, grads = one_pass(tiny(), threads=1)
    got, many = one_pass(tiny(), threads=limits.MAX_THREADS)
    assert (got == want).all() and all((many[name] == g).all() for name, g in grads.items())


def test_threads_that_cannot_be_started_are_refused_by_name_and_not_taken_by_default(monkeypatch):
    """Where a thread cannot be started, OpenMP ends the process."""
    monkeypatch.setattr(limits, "startable", lambda count: min(count, 2))
    monkeypatch.setattr(limits, "threads", lambda: 8)
    line = r"\[backend\] threads is at most 3, which this process can start now, but got 4. hint: ulimit -u"
    with pytest.raises(HandgradError, match=line):
        open_backend("cpu", 4)
    assert open_backend("cpu", 3).threads == open_backend("cpu").threads == 3


def test_startable_threads_are_counted_by_starting_them():
    """256 MiB of address space beyond what is used: fewer than 100 stacks of 8 MiB."""
    code = (
        "from handgrad.core import limits\n"
        "import resource\n"
        "status = open('/proc/self/status').read()\n"
        "size = int(status.split('VmSize:')[1].split()[0]) * 1024 + (256 << 20)\n"
        "before = limits.startable(3)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
        "print(before, limits.startable(100))"
    )
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    before, after = map(int, done.stdout.split())
    assert before == 3 and 0 < after < 100, done.stderr


@pytest.mark.parametrize(("running", "count"), [(1, 10_000), (9, 10_000), (10, 1000), (40, 1000)])
def test_threads_spin_only_where_cores_are_idle(machine, monkeypatch, running, count):
    """16 CPUs, 8 threads: up to 8 other running threads leave every thread a CPU."""
    library = import_module("handgrad.backends.cpu.library")
    monkeypatch.setattr(library.os, "cpu_count", lambda: 16)
    root = machine(files={"proc/loadavg": f"3.10 2.00 1.00 {running}/312 4711\n"})
    assert library.spin_count(root) == count


def test_no_load_average_is_an_idle_machine(tmp_path):
    library = import_module("handgrad.backends.cpu.library")
    assert library.spin_count(tmp_path) == library.SPINS_IDLE


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "passive")])
def test_the_users_way_of_waiting_stays(name, value):
    code = "import os; from handgrad.backends import open_backend; open_backend('cpu'); print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | {name: value}, timeout=60
    )
    assert done.stdout.strip() == ("77" if name == "GOMP_SPINCOUNT" else "None")
