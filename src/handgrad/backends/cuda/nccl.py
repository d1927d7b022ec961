"""nccl: the ranks' collectives on GPUs, by NCCL through ctypes.

The communicator does not block, so that a thread can abort it when another rank has failed: a kernel of NCCL waits for
ever for a rank that is gone.
"""

import ctypes
import os
import sys
import threading
import time
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

from handgrad.backends.cuda.driver import Device
from handgrad.backends.cuda.libraries import load
from handgrad.backends.ranks.comm import Comm, RankError
from handgrad.core.errors import HandgradError

SUCCESS, IN_PROGRESS, SUM = 0, 7, 0  # ncclResult_t, ncclRedOp_t
TYPES = {"f32": 7, "f64": 8, "bf16": 9}  # ncclDataType_t
UNDEFINED = -(2**31)  # an int of ncclConfig_t that keeps its default
MAGIC, VERSION = 0xCAFEBEEF, 22800  # of ncclConfig_t; later versions only append fields
CALL_SECONDS = 60.0  # a call of the library may take
POLL_SECONDS = 0.1  # between checks of the guard
GONE_SECONDS, FAILED_SECONDS = 1.0, 12.0  # the host may wait for the GPU once a rank is gone, or has failed
EXIT_SECONDS = 5.0  # the host may wait after an abort; then the process ends
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of this machine: containers may share a host name
HINT = "NCCL_DEBUG=INFO says more"
# Multicast sums differ from call to call, so a run would not repeat
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0"}
STEADY = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}  # whatever the sizes


class Id(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = [("bytes", ctypes.c_ubyte * 128)]


class Config(ctypes.Structure):
    """ncclConfig_t of VERSION."""

    _fields_ = [
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
        ("traffic_class", c_int),
        ("comm_name", c_char_p),
        ("collnet_enable", c_int),
        ("cta_policy", c_int),
        ("shrink_share", c_int),
        ("nvls_ctas", c_int),
        ("channels_per_net_peer", c_int),
        ("nvlink_centric_sched", c_int),
    ]


_P, _N, _I = c_void_p, c_size_t, c_int
CALLS: dict[str, list[Any]] = {
    "ncclGetUniqueId": [_P],
    "ncclCommInitRankConfig": [_P, _I, Id, _I, _P],
    "ncclCommGetAsyncError": [_P, _P],
    "ncclCommAbort": [_P],
    "ncclAllReduce": [_P, _P, _N, _I, _I, _P, _P],
    "ncclReduceScatter": [_P, _P, _N, _I, _I, _P, _P],
    "ncclAllGather": [_P, _P, _N, _I, _P, _P],
}


class Nccl:
    """The ranks' communicator on their GPUs. All ranks open it together.

    deterministic: one algorithm for all sizes

    Raises HandgradError if two ranks share a GPU, or the GPUs are not all of the same model.
    """

    def __init__(self, device: Device, comm: Comm, deterministic: bool):
        self._device, self._comm = device, comm
        check_gpus(device, comm)
        for name, value in (NO_MULTICAST | (STEADY if deterministic else {})).items():
            os.environ.setdefault(name, value)
        self._dll = load("nccl", "nvidia-nccl-cu13")
        for name, types in CALLS.items():
            function = getattr(self._dll, name)
            function.argtypes, function.restype = types, c_int
        self._dll.ncclGetErrorString.restype = c_char_p
        unique = Id()
        if comm.rank == 0:
            self._check("ncclGetUniqueId", self._dll.ncclGetUniqueId(byref(unique)))
        unique = Id.from_buffer_copy(bytes.fromhex(comm.all_gather_object(bytes(unique).hex())[0]))
        config = Config(
            ctypes.sizeof(Config), MAGIC, VERSION, 0, *[UNDEFINED] * 3, None, *[UNDEFINED] * 2, None, *[UNDEFINED] * 6
        )
        self._handle = c_void_p()
        status = self._dll.ncclCommInitRankConfig(byref(self._handle), comm.world, unique, comm.rank, byref(config))
        self._check("ncclCommInitRankConfig", status, pause=1e-3)
        comm.is_stuck = self._is_stuck  # type: ignore[method-assign]
        threading.Thread(target=self._guard, daemon=True).start()

    def start(self, kind: str, send: int, receive: int, count: int, dtype: str, stream: Any) -> None:
        """Starts a collective on a stream, from one address to another; `count` as in launch.Collective."""
        dll, on, kind_of = self._dll, int(stream), TYPES[dtype]
        if kind == "all_reduce":
            status = dll.ncclAllReduce(send, receive, count, kind_of, SUM, self._handle, on)
        elif kind == "reduce_scatter":
            status = dll.ncclReduceScatter(send, receive, count, kind_of, SUM, self._handle, on)
        else:
            status = dll.ncclAllGather(send, receive, count, kind_of, self._handle, on)
        if status:
            self._check(kind, status)

    def _check(self, what: str, status: int, pause: float = 0.0) -> None:
        """Waits until a non-blocking call has been enqueued. Raises HandgradError if it failed."""
        end = time.monotonic() + CALL_SECONDS
        while status == IN_PROGRESS:
            time.sleep(pause)
            self._comm.check()
            status = self._async_error()
            if status == IN_PROGRESS and time.monotonic() > end:
                raise HandgradError("nccl", f"{what} has not ended after {CALL_SECONDS:.0f} s", hint=HINT)
        if status != SUCCESS:
            raise HandgradError("nccl", f"{what} failed: {self._text(status)}", hint=HINT)

    def _text(self, error: int) -> str:
        """An error in NCCL's words."""
        return self._dll.ncclGetErrorString(error).decode()

    def _async_error(self) -> int:
        """The error of the communicator, SUCCESS or IN_PROGRESS if there is none."""
        found = c_int()
        self._dll.ncclCommGetAsyncError(self._handle, byref(found))
        return found.value

    def _guard(self) -> None:
        """Ends a host wait that would never return, because a rank has failed or the network has."""
        watch, since = self._comm.watch, 0.0
        while watch is not None:
            time.sleep(POLL_SECONDS)
            waited, failure = self._device.waited(), watch.failure
            if failure is None and watch.is_over:
                failure = RankError(self._comm.rank, "this rank has failed")
            if failure is None:
                error = self._async_error() if waited > GONE_SECONDS else SUCCESS
                if error not in (SUCCESS, IN_PROGRESS):
                    failure = RankError(self._comm.rank, f"a collective failed: {self._text(error)}", 1)
                    self._comm.fail(failure.rule, 1)
                    self._abort(failure)
                    return
                continue
            since = since or time.monotonic()
            if min(waited, time.monotonic() - since) > (GONE_SECONDS if failure.is_gone else FAILED_SECONDS):
                self._abort(failure)
                return

    def _abort(self, failure: RankError) -> None:
        """Aborts the communicator. The host's wait then returns without an error, so `failure` is set first."""
        self._device.failure = failure
        abort = self._dll.ncclCommAbort  # returns once the graphs are gone
        threading.Thread(target=abort, args=[self._handle], daemon=True).start()
        end = time.monotonic() + EXIT_SECONDS
        while self._device.waited() > 0:
            time.sleep(POLL_SECONDS)
            if time.monotonic() > end:
                print(failure, file=sys.stderr, flush=True)
                os._exit(failure.code)

    def _is_stuck(self) -> bool:
        """Whether the GPU waits for a rank that has failed, or did so until the communicator was aborted."""
        end = time.monotonic() + GONE_SECONDS
        while self._device.is_busy() and time.monotonic() < end:
            time.sleep(0.01)
        return self._device.failure is not None or self._device.is_busy()


def check_gpus(device: Device, comm: Comm) -> None:
    """Raises HandgradError unless every rank has a GPU of its own, and all have the same model."""
    gpus = comm.all_gather_object([BOOT.read_text(), device.pci_bus, device.name])
    for rank, (host, bus, name) in enumerate(gpus):
        first = next(r for r, other in enumerate(gpus) if other[:2] == [host, bus])
        if first != rank:
            hint = "no more ranks on a machine than it has GPUs; nvidia-smi -L lists them"
            raise HandgradError("ranks", f"ranks {first} and {rank} share one GPU, {name}", hint=hint)
        if name != gpus[0][2]:
            raise HandgradError("ranks", f"all ranks have the GPU of rank 0, {gpus[0][2]}", f"{name} on rank {rank}")
