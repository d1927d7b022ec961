"""CudaArena: the planned memory on the GPU. Reads and writes go through pinned memory and do not stall the stream."""

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from handgrad.backends.arena import NUMPY, STEP_SCALARS_DTYPE, does_not_fit
from handgrad.backends.base import Arena
from handgrad.backends.cuda.driver import Device
from handgrad.backends.cuda.planner import RESERVE
from handgrad.core.dtypes import DType
from handgrad.core.plan import MIB, Plan
from handgrad.core.program import Program
from handgrad.core.scalars import INPUT_BYTES, OUTPUTS
from handgrad.core.tensor import Tensor

CHUNK, CHUNKS = 1 << 18, 128  # bytes of a pinned staging chunk; chunks in the ring, enough for 42 micro-batches


class CudaArena(Arena):
    """One zeroed allocation."""

    def __init__(self, device: Device, plan: Plan):
        self.plan, self.device, self.address = plan, device, 0
        free, total = device.memory()
        if plan.nbytes + RESERVE > free:
            others = f" of {total / MIB:.0f} (libraries and other processes use some: nvidia-smi)"
            raise does_not_fit(plan, max(free - RESERVE, 0), others)
        self.address = device.alloc(max(plan.nbytes, 1))
        device.fill(self.address, max(plan.nbytes, 1))
        self._staging = device.pinned(CHUNK * CHUNKS)
        self._events: list[Any] = [None] * CHUNKS
        self._next = 0
        self._unused: dict[int, list[tuple[int, Any]]] = defaultdict(list)  # by size: pinned buffers and their events
        self._written: dict[int, np.ndarray] = {}  # step scalars as the host wrote them last
        self.write_constants()

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone at the end of the process
            self.device.sync()
            self.device.free(self.address)

    def fetch(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        return self._fetch(self.plan.offset[tensor], tensor.nbytes, NUMPY[tensor.dtype.name], tensor.shape)

    def write(self, tensor: Tensor, values: Any) -> None:
        array = np.ascontiguousarray(np.broadcast_to(values, tensor.shape), NUMPY[tensor.dtype.name])
        self._write(self.plan.offset[tensor], array)

    def read_part(self, flat: str, param: Tensor) -> np.ndarray:
        start, low, high, dtype = self._piece(flat, param)
        shape = self.plan.vectors[flat].shape(param)
        out = np.empty(shape if high - low == math.prod(shape) else high - low, NUMPY[dtype.name])
        if out.size:
            self.device.to_host(out.ctypes.data, self.address + start, out.nbytes)
            self.device.sync()
        return out

    def write_part(self, flat: str, param: Tensor, values: Any) -> None:
        start, low, high, dtype = self._piece(flat, param)
        whole = np.broadcast_to(values, self.plan.vectors[flat].shape(param))
        self._write(start, np.ascontiguousarray(whole.reshape(-1)[low:high], NUMPY[dtype.name]))

    def _piece(self, flat: str, param: Tensor) -> tuple[int, int, int, DType]:
        """(byte of the arena, first, end, type) of the elements of a parameter that this rank holds in a vector."""
        vector = self.plan.vectors[flat]
        start, low, high = vector.piece(param)
        return self.plan.start[flat] + start * vector.dtype.size, low, high, vector.dtype

    def fetch_scalars(self, program: Program) -> Callable[[], Any]:
        read = self._fetch(self.plan.offset[program.scalars], STEP_SCALARS_DTYPE.itemsize, STEP_SCALARS_DTYPE, (1,))
        return lambda: read().view(np.recarray)[0]

    def write_scalars(self, program: Program, **values: int | float) -> None:
        record = self._written.setdefault(id(program), np.zeros(1, STEP_SCALARS_DTYPE))
        for name, value in values.items():
            record[name] = value
        outputs = any(name in values for name, *_ in OUTPUTS)  # else keep what kernels wrote
        raw = record.view(np.uint8)
        self._write(self.plan.offset[program.scalars], raw if outputs else raw[:INPUT_BYTES])

    def fill(self, byte: int) -> None:
        """Sets every byte, for checks of what kernels write."""
        self.device.fill(self.address, self.plan.nbytes, byte)

    def memory(self) -> np.ndarray:
        """A copy of all bytes."""
        out = np.empty(self.plan.nbytes, np.uint8)
        self.device.to_host(out.ctypes.data, self.address, out.nbytes)
        self.device.sync()
        return out

    def _write(self, offset: int, array: np.ndarray) -> None:
        """Copies into pinned chunks, which the device copies in stream order."""
        source, left, to = array.ctypes.data, array.nbytes, self.address + offset
        while left > 0:
            i, size = self._next, min(left, CHUNK)
            self._next = (i + 1) % CHUNKS
            if self._events[i] is None:
                self._events[i] = self.device.event()
            else:
                self.device.wait(self._events[i])  # until the device has read this chunk
            ctypes.memmove(self._staging + i * CHUNK, source, size)
            self.device.to_device(to, self._staging + i * CHUNK, size)
            self.device.record(self._events[i])
            source, to, left = source + size, to + size, left - size

    def _fetch(self, offset: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        unused = self._unused[nbytes]
        buffer, event = unused.pop() if unused else (self.device.pinned(max(nbytes, 1)), self.device.event())
        self.device.to_host(buffer, self.address + offset, nbytes)
        self.device.record(event)
        held: list[np.ndarray] = []

        def result() -> np.ndarray:
            if not held:
                self.device.wait(event)
                raw = memoryview((ctypes.c_char * nbytes).from_address(buffer))
                held.append(np.frombuffer(raw, dtype).reshape(shape).copy())
                unused.append((buffer, event))
            return held[0]

        return result
