"""The collectives of GPUs without any: NCCL is a fake that a test answers for, ranks are threads."""

import ctypes
import subprocess
import sys
import threading
import time

import pytest
from rank_threads import Threads, on_ranks

from handgrad.backends.ranks.comm import RankError
from handgrad.core.errors import HandgradError

pytest.importorskip("cuda.bindings", reason="the driver's bindings come with handgrad[cuda]")

from handgrad.backends.cuda import nccl  # noqa: E402


class Library:
    """Notes the calls; `answers` are the states that an asynchronous question gets, the last one for ever."""

    def __init__(self, answers=(0,), first=nccl.IN_PROGRESS):
        self.answers, self.first, self.calls = list(answers), first, []
        for name in nccl.CALLS:
            setattr(self, name, self._call(name))
        self.ncclGetErrorString = self._call("ncclGetErrorString")

    def _call(self, name):
        def call(*args):
            self.calls.append((name, args))
            if name == "ncclGetUniqueId":
                args[0]._obj.bytes[:] = range(128)
            if name == "ncclCommGetAsyncError":
                args[1]._obj.value = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if name == "ncclGetErrorString":
                return b"unhandled system error"
            return self.first if name.startswith(("ncclCommInit", "ncclAll", "ncclReduce")) else 0

        return call

    def named(self, name):
        return [args for found, args in self.calls if found == name]


class Device:
    name, failure = "NVIDIA H200", None

    def __init__(self, rank, waits=0.0):
        self.pci_bus, self.waits, self.busy = f"0000:0{rank}:00.0", waits, False

    def waited(self):
        return self.waits

    def is_busy(self):
        return self.busy


def opened(monkeypatch, library, world=2, device=Device):
    monkeypatch.setattr(nccl, "load", lambda *names: library)
    return on_ranks(world, lambda comm: nccl.Nccl(device(comm.rank), comm, False))


def test_all_ranks_open_one_communicator_and_wait_until_it_is_ready(monkeypatch):
    library = Library(answers=[nccl.IN_PROGRESS, nccl.IN_PROGRESS, 0])
    opened(monkeypatch, library)
    begun = library.named("ncclCommInitRankConfig")
    assert sorted((world, rank) for _, world, _, rank, _ in begun) == [(2, 0), (2, 1)]
    assert all(bytes(unique.bytes) == bytes(range(128)) for _, _, unique, _, _ in begun)
    config = begun[0][4]._obj
    assert (config.size, config.magic, config.version, config.blocking) == (80, 0xCAFEBEEF, 22800, 0)
    assert config.max_ctas == config.nvlink_centric_sched == nccl.UNDEFINED and config.net_name is None
    assert len(library.named("ncclGetUniqueId")) == 1 and len(library.named("ncclCommGetAsyncError")) >= 3


@pytest.mark.parametrize(
    "kind, name, rest",
    [
        ("all_reduce", "ncclAllReduce", (7, nccl.SUM)),
        ("reduce_scatter", "ncclReduceScatter", (7, nccl.SUM)),
        ("all_gather", "ncclAllGather", (7,)),
    ],
)
def test_collective_gets_its_addresses_count_and_type(monkeypatch, kind, name, rest):
    library = Library()
    (one, _) = opened(monkeypatch, library)
    one.start(kind, 4096, 8192, 77, "f32", 5)
    ((send, receive, count, *other, _, stream),) = library.named(name)
    assert (send, receive, count, tuple(other), stream) == (4096, 8192, 77, rest, 5)


def test_error_of_the_library_is_told_in_its_words(monkeypatch):
    with pytest.raises(HandgradError, match="ncclCommInitRankConfig failed: unhandled system error"):
        opened(monkeypatch, Library(answers=[2]))


def test_wait_for_the_library_ends_with_another_ranks_error(monkeypatch):
    library = Library()
    (one, _) = opened(monkeypatch, library)
    library.answers = [nccl.IN_PROGRESS]

    def told():
        raise RankError(1, "its process has ended", 1, is_gone=True)

    monkeypatch.setattr(one._comm, "check", told)
    with pytest.raises(RankError, match=r"\[rank 1\] its process has ended"):
        one.start("all_reduce", 0, 0, 1, "f32", 0)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    with pytest.raises(HandgradError, match="ranks 0 and 1 share one GPU, NVIDIA H200"):
        opened(monkeypatch, Library(), device=lambda rank: Device(0))


def test_another_model_of_gpu_is_refused(monkeypatch):
    def device(rank):
        found = Device(rank)
        found.name = f"GPU {rank}"
        return found

    with pytest.raises(HandgradError, match="all ranks have the GPU of rank 0, GPU 0, but got GPU 1 on rank 1"):
        opened(monkeypatch, Library(), device=device)


class Watched:
    """What a rank knows of the others."""

    failure, is_over = None, False

    def check(self):
        if self.failure:
            raise self.failure

    def fail(self, text, code):
        self.is_over, self.told = True, text


def guarded(monkeypatch, waits, failure=None, is_over=False, answers=(0,)):
    """(the library, the device, the watch) a moment after a failure, while the host waits so many seconds for the GPU:
    an abort ends the wait."""
    monkeypatch.setattr(nccl, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(nccl, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(nccl, "FAILED_SECONDS", 0.3)
    library, watch = Library(), Watched()
    monkeypatch.setattr(Threads, "watch", watch)
    monkeypatch.setattr(nccl.Nccl, "_guard", lambda self: None)
    (one, _) = opened(monkeypatch, library)
    monkeypatch.undo()
    for name, value in (("POLL_SECONDS", 0.01), ("GONE_SECONDS", 0.05), ("FAILED_SECONDS", 0.3)):
        monkeypatch.setattr(nccl, name, value)
    one._comm.watch, one._comm.fail, library.answers = watch, watch.fail, list(answers)
    one._device.waits, watch.failure, watch.is_over = waits, failure, is_over
    aborted = library.ncclCommAbort

    def abort(handle):
        assert one._device.failure is not None  # known before the wait ends
        one._device.waits = 0.0
        return aborted(handle)

    library.ncclCommAbort = abort
    thread = threading.Thread(target=one._guard, daemon=True)
    thread.start()
    thread.join(0.2)
    return library, one._device, watch


GONE, TOLD = RankError(1, "its process has ended", 1, is_gone=True), RankError(1, "a file is whole", 2)


@pytest.mark.parametrize(
    "waits, failure, is_over, is_aborted",
    [
        (1.0, GONE, True, True),
        (0.0, GONE, True, False),
        (99.0, TOLD, True, False),  # the wait is older than the failure: the step may still end
        (99.0, None, True, False),  # this rank's own
        (99.0, None, False, False),
    ],
    ids=["one that is gone", "no wait", "one that has failed", "an own failure", "no failure"],
)
def test_wait_for_the_gpu_ends_where_it_would_last_for_ever(monkeypatch, waits, failure, is_over, is_aborted):
    library, device, watch = guarded(monkeypatch, waits, failure, is_over)
    assert bool(library.named("ncclCommAbort")) == is_aborted == (device.failure is not None)
    time.sleep(0.3)
    assert bool(library.named("ncclCommAbort")) == (is_over and waits > 0)
    assert device.failure is None or (failure or device.failure) is device.failure
    device.waits, watch.failure = 1.0, GONE  # ends the guard
    time.sleep(0.2)


def test_failure_of_the_network_ends_the_wait_and_is_told_to_all(monkeypatch):
    library, device, watch = guarded(monkeypatch, 1.0, answers=[6])
    assert library.named("ncclCommAbort") and "a collective failed: unhandled system error" in str(device.failure)
    assert "a collective failed" in watch.told


def test_process_ends_where_an_abort_does_not_free_it(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(nccl, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(nccl, "EXIT_SECONDS", 0.05)
    (one, _) = opened(monkeypatch, Library())
    one._device.waits = 1.0

    def end(code):
        ended.append(code)
        one._device.waits = 0.0

    monkeypatch.setattr(nccl.os, "_exit", end)
    one._abort(GONE)
    assert ended == [1] and "[rank 1] its process has ended" in capsys.readouterr().err


def test_wait_of_the_host_raises_what_has_ended_it(monkeypatch):
    from handgrad.backends.cuda import driver

    device = driver.Device.__new__(driver.Device)
    device.stream, released = object(), threading.Event()

    def synchronize(stream):
        released.wait(5)
        return (driver.cu.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver.cu, "cuStreamSynchronize", synchronize)
    device._waits_since = None
    seen = []

    def abort():
        while device.waited() < 0.05:
            time.sleep(0.01)
        seen.append(device.waited())
        device.failure = RankError(1, "its process has ended", 1, is_gone=True)
        released.set()

    thread = threading.Thread(target=abort)
    thread.start()
    with pytest.raises(RankError, match="its process has ended"):
        device.sync()
    thread.join()
    assert seen[0] >= 0.05 and device.waited() == 0.0


@pytest.mark.parametrize("busy, failure, stuck", [(False, None, False), (True, None, True), (False, GONE, True)])
def test_process_is_stuck_where_the_gpu_would_keep_it(monkeypatch, busy, failure, stuck):
    monkeypatch.setattr(nccl, "GONE_SECONDS", 0.05)
    (one, other) = opened(monkeypatch, Library())
    one._device.busy, one._device.failure = busy, failure
    assert one._comm.is_stuck() == stuck and not other._comm.is_stuck()
    assert ctypes.sizeof(nccl.Id) == 128


STUCK = """
import sys
from handgrad.backends.ranks.startup import RanksRequest, open_comm
from handgrad.core.errors import HandgradError
from handgrad.train.ranks import together

class Hangs:
    def __del__(self):
        import time
        time.sleep(60)  # as a GPU whose queue never ends

comm = open_comm(RanksRequest(2, int(sys.argv[1]), 0, sys.argv[2]))
keep = Hangs()
comm.is_stuck = lambda: True
with together(comm):
    if comm.rank == 1:
        raise {error}
    comm.total(1.0)
"""


@pytest.mark.parametrize(
    "error, code, text",
    [
        ("HandgradError('data', 'a file is whole')", 2, "[rank 1] [data] a file is whole"),
        ("KeyError('bug')", 1, "KeyError: 'bug'"),
    ],
)
def test_process_that_is_stuck_says_why_it_ends(tmp_path, error, code, text):
    command = [sys.executable, "-c", STUCK.replace("{error}", error)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in (0, 1)
    ]
    told = "".join(process.communicate(timeout=30)[0] for process in ranks)
    assert [process.returncode for process in ranks] == [code, code] and text in told


def test_script_that_ends_by_an_error_is_not_kept_by_its_gpu(tmp_path):
    """Without `together`, as a script that uses hg.Trainer."""
    script = STUCK.replace("with together(comm):", "if True:").replace("{error}", "KeyError('bug')")
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in (0, 1)
    ]
    told = "".join(process.communicate(timeout=30)[0] for process in ranks)
    assert [process.returncode for process in ranks] == [1, 1] and "KeyError: 'bug'" in told
