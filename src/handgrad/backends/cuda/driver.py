"""The CUDA driver: devices, memory, streams, events and modules, as thin functions over cuda-bindings."""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once
from typing import Any

import numpy as np

from handgrad.backends.arena import NUMPY
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.launch import TMA_TILE

MIN_CAPABILITY = (8, 0)  # bf16 tensor cores

try:
    from cuda.bindings import driver as cu
except ImportError as error:
    rule = f"the package cuda-bindings does not load: {error}"
    raise HandgradError("cuda", rule, hint=install_command("cuda")) from None


def check(result: tuple) -> Any:
    """The values of a driver call. Raises HandgradError with the driver's name of the error."""
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        hint = ""
        if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            hint = "another process may use the GPU (see nvidia-smi); otherwise a smaller micro_batch"
        raise HandgradError("cuda", f"a driver call failed: {status.name}", hint=hint)
    return values[0] if len(values) == 1 else tuple(values)


def start() -> int:
    """Initialises the driver; returns its CUDA version, e.g. 13000."""
    try:
        (status,) = cu.cuInit(0)
    except RuntimeError as error:  # no libcuda
        hint = "install one (580 or newer), or backend 'cpu'"
        raise HandgradError("cuda", "no NVIDIA driver found: libcuda.so.1 is missing", hint=hint) from error
    if status != cu.CUresult.CUDA_SUCCESS:
        hint = "nvidia-smi shows what the driver finds; backend 'cpu' needs no GPU"
        raise HandgradError("cuda", f"this process has no GPU: {status.name}", hint=hint)
    return check(cu.cuDriverGetVersion())


class Device:
    """One GPU: its primary context, a main stream, a side stream for calls that overlap later ones, and one for
    collectives.

    failure: of another rank; it has ended what the host waited for, and is raised there
    """

    failure: HandgradError | None = None

    def __init__(self, index: int = 0):
        version = start()
        if version < 13000:
            rule = f"the NVIDIA driver is too old: it supports CUDA {version // 1000}.{version % 1000 // 10}, not 13"
            raise HandgradError("cuda", rule, hint="install driver 580 or newer")
        if index >= count():
            hint = "CUDA_VISIBLE_DEVICES may hide some; nvidia-smi lists all; backend 'cpu' needs no GPU"
            raise HandgradError("cuda", f"GPU {index} exists", f"{count()} GPUs", hint=hint)
        self.handle = check(cu.cuDeviceGet(index))
        self.name = check(cu.cuDeviceGetName(128, self.handle)).split(b"\0")[0].decode()
        self.version = version
        self.capability = self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        self.sms = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.l2_bytes = self._attribute("L2_CACHE_SIZE")
        if self.capability < MIN_CAPABILITY:
            got = f"{self.name} with {self.capability[0]}.{self.capability[1]}"
            raise HandgradError("cuda", "the GPU has compute capability 8.0 or newer", got)
        self.context = check(cu.cuDevicePrimaryCtxRetain(self.handle))
        check(cu.cuCtxSetCurrent(self.context))
        flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = check(cu.cuStreamCreate(flags))
        _, first = check(cu.cuCtxGetStreamPriorityRange())
        self.side = check(cu.cuStreamCreateWithPriority(flags, first))  # high priority
        self.exchange = check(cu.cuStreamCreate(flags))
        self._waits_since: float | None = None

    def _attribute(self, name: str) -> int:
        kind = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return check(cu.cuDeviceGetAttribute(kind, self.handle))

    @property
    def pci_bus(self) -> str:
        """The PCI address, e.g. "0000:3b:00.0". NVML finds the device by it, for any CUDA numbering."""
        return check(cu.cuDeviceGetPCIBusId(13, self.handle)).split(b"\0")[0].decode()

    @property
    def arch(self) -> str:
        """The target of kernels, e.g. "sm_90a": from 9.0 on "a" enables architecture-specific instructions."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        return check(cu.cuMemGetInfo())

    def alloc(self, nbytes: int) -> int:
        """The address of newly allocated device memory."""
        return int(check(cu.cuMemAlloc(nbytes)))

    def free(self, address: int) -> None:
        check(cu.cuMemFree(address))

    def pinned(self, nbytes: int) -> int:
        """The address of page-locked host memory, for asynchronous copies."""
        return int(check(cu.cuMemAllocHost(nbytes)))

    def fill(self, address: int, nbytes: int, byte: int = 0) -> None:
        check(cu.cuMemsetD8Async(address, byte, nbytes, self.stream))

    def to_device(self, device: int, host: int, nbytes: int) -> None:
        check(cu.cuMemcpyHtoDAsync(device, host, nbytes, self.stream))

    def to_host(self, host: int, device: int, nbytes: int) -> None:
        self._wait(cu.cuMemcpyDtoHAsync, host, device, nbytes, self.stream)  # waits where the host's memory is pageable

    def within(self, to: int, source: int, nbytes: int) -> None:
        check(cu.cuMemcpyDtoDAsync(to, source, nbytes, self.stream))

    def sync(self) -> None:
        """Waits until the main stream is idle."""
        self._wait(cu.cuStreamSynchronize, self.stream)

    def is_busy(self) -> bool:
        """Whether work is queued on any of the streams."""
        streams = (self.stream, self.side, self.exchange)
        return any(cu.cuStreamQuery(s)[0] == cu.CUresult.CUDA_ERROR_NOT_READY for s in streams)

    def event(self, timing: bool = False, blocking: bool = False) -> Any:
        """A CUDA event. timing: it records its time; blocking: the host sleeps while it waits, instead of spinning."""
        kinds = cu.CUevent_flags
        flags = kinds.CU_EVENT_DEFAULT if timing else kinds.CU_EVENT_DISABLE_TIMING
        return check(cu.cuEventCreate(flags | kinds.CU_EVENT_BLOCKING_SYNC * blocking))

    def record(self, event: Any, stream: Any = None) -> None:
        check(cu.cuEventRecord(event, stream or self.stream))

    def follow(self, event: Any, stream: Any) -> None:
        """Makes a stream wait for an event."""
        check(cu.cuStreamWaitEvent(stream, event, 0))

    def wait(self, event: Any) -> None:
        """Blocks the host until the event has completed."""
        self._wait(cu.cuEventSynchronize, event)

    def _wait(self, call: Callable, *arguments: Any) -> Any:
        """A driver call that may wait for the GPU. Raises `failure` if the wait ended because another rank failed."""
        self._waits_since = time.monotonic()
        try:
            result = call(*arguments)
        finally:
            self._waits_since = None
        if self.failure is not None:
            raise self.failure
        return check(result)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block whose launches may wait for the GPU: its queue may be full."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def waited(self) -> float:
        """Seconds that the host has waited for the device by now; 0: it does not wait."""
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two timing events. Waits for the later one."""
        self.wait(end)
        return check(cu.cuEventElapsedTime(begin, end)) * 1e-3

    def randomise(self, address: int, nbytes: int) -> None:
        """Fills memory with normal bf16 numbers: 4 Mi of them, repeated."""
        done = min(nbytes, 8 << 20) // 2 * 2
        self.to_device(address, _normal().ctypes.data, done)
        while 0 < done < nbytes:
            size = min(done, nbytes - done)
            self.within(address + done, address, size)
            done += size
        self.sync()


@once
def _normal() -> np.ndarray:
    """4 Mi normal numbers, bf16."""
    return np.random.default_rng(0).standard_normal(4 << 20, np.float32).astype(NUMPY["bf16"])


class Mark:
    """A timing event, destroyed with this object."""

    def __init__(self):
        self.event = check(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_BLOCKING_SYNC))

    def __del__(self, destroy: Callable = cu.cuEventDestroy) -> None:
        destroy(self.event)


class Module:
    """A loaded cubin."""

    def __init__(self, cubin: bytes):
        self._module = check(cu.cuModuleLoadData(cubin))
        self._limits: dict[str, int] = {}

    def function(self, name: str, shared: int) -> Any:
        """A kernel by name, whose limit of dynamic shared memory is at least `shared` bytes from now on.

        Without a limit of its own it has 48 KiB, less what it declares as static.
        """
        function = check(cu.cuModuleGetFunction(self._module, name.encode()))
        if shared > self._limits.get(name, 0):
            self._limits[name] = shared
            kind = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(cu.cuFuncSetAttribute(function, kind, shared))
        return function


def launcher(
    stream: Any, function: Any, grid: tuple[int, int, int], block: int, shared: int, args: Sequence[Any]
) -> Callable[[], None]:
    """A function that launches a kernel with these arguments (ctypes values)."""
    pointers = (ctypes.c_void_p * max(len(args), 1))(*[ctypes.addressof(a) for a in args])
    keep, address = (args, pointers), ctypes.addressof(pointers)

    def launch() -> None:
        assert keep
        check(cu.cuLaunchKernel(function, *grid, block, 1, 1, shared, stream, address, 0))

    return launch


def tensor_map(address: int, rows: int, columns: int) -> ctypes.Array:
    """A kernel argument: the tensor map by which TMA copies a row-major bf16 matrix in tiles of TMA_TILE x TMA_TILE,
    with the 128-byte swizzle. Rows must be a multiple of 16 bytes."""
    interleave = cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    tensor = cu.cuTensorMapEncodeTiled(
        cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        address,
        [cu.cuuint64_t(columns), cu.cuuint64_t(rows)],
        [cu.cuuint64_t(columns * 2)],
        [cu.cuuint32_t(TMA_TILE)] * 2,
        [cu.cuuint32_t(1)] * 2,
        interleave,
        cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return (ctypes.c_uint64 * 16)(*[int(word) for word in check(tensor).opaque])


def count() -> int:
    """GPUs that this process sees."""
    start()
    return check(cu.cuDeviceGetCount())


def find_gpus() -> list[tuple[str, tuple[int, int], int]]:
    """(name, compute capability, bytes of memory) of every GPU. Raises HandgradError if there is no driver."""
    start()
    found = []
    for i in range(count()):
        handle = check(cu.cuDeviceGet(i))
        kinds = cu.CUdevice_attribute
        major = check(cu.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
        minor = check(cu.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
        name = check(cu.cuDeviceGetName(128, handle)).split(b"\0")[0].decode()
        found.append((name, (major, minor), check(cu.cuDeviceTotalMem(handle))))
    return found
