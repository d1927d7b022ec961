"""The collectives of GPUs without any: NCCL is a fake that a test answers for, ranks are threads."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
from rank_threads import on_ranks

from handgrad.backends.ranks.comm import RankError, Threads
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
    with pytest.raises(HandgradError, match="every rank has a GPU of its own, but ranks 0 and 1 share one"):
        opened(monkeypatch, Library(), device=lambda rank: Device(0))


def test_another_model_of_gpu_is_refused(monkeypatch):
    def device(rank):
        found = Device(rank)
        found.name = f"GPU {rank}"
        return found

    with pytest.raises(HandgradError, match="all ranks have the GPU of rank 0, GPU 0, but got GPU 1 on rank 1"):
        opened(monkeypatch, Library(), device=device)


def failing(monkeypatch, waits, is_gone):
    """(the library, the device) a moment after rank 1 has failed, while the host has waited so many seconds for the
    device; the backstop that ends the process is left out."""
    monkeypatch.setattr(nccl, "GRACE", 0.05)
    monkeypatch.setattr(nccl, "TOLD_GRACE", 0.3)
    monkeypatch.setattr(nccl.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    listeners = []
    monkeypatch.setattr(Threads, "on_failure", lambda self, listener: listeners.append(listener))
    library = Library()
    (one, _) = opened(monkeypatch, library)
    one._device.waits = waits
    failure = RankError(1, "its process has ended", 1, is_gone=is_gone)
    for listener in listeners:
        if listener.__self__ is one:
            listener(failure)
    time.sleep(0.25)
    return library, one._device


@pytest.mark.parametrize(
    "waits, is_gone, is_aborted",
    [(1.0, True, True), (0.0, True, False), (0.1, False, False), (1.0, False, True)],
    ids=["waits for one that is gone", "does not wait", "may still be answered", "waits too long"],
)
def test_communicator_is_aborted_where_the_host_waits_in_vain(monkeypatch, waits, is_gone, is_aborted):
    """The failure is known before the abort, which ends the wait as if all were well."""
    library, device = failing(monkeypatch, waits, is_gone)
    assert bool(library.named("ncclCommAbort")) == is_aborted
    assert (device.failure is not None) == is_aborted
    device.waits = 9.0  # ends the thread that looks


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


@pytest.mark.parametrize("busy, failure", [(True, None), (False, RankError(1, "gone"))])
def test_process_ends_at_once_where_the_gpu_would_keep_it(monkeypatch, busy, failure):
    monkeypatch.setattr(nccl, "GRACE", 0.05)
    ended = []
    monkeypatch.setattr(nccl.atexit, "_run_exitfuncs", lambda: ended.append("cleaned"))
    monkeypatch.setattr(nccl.os, "_exit", ended.append)
    (one, other) = opened(monkeypatch, Library())
    other._comm.leave(2)
    assert ended == []
    one._device.busy, one._device.failure = busy, failure
    one._comm.leave(7)
    assert ended == ["cleaned", 7]
    assert ctypes.sizeof(nccl.Id) == 128
