"""cpu: binds every call to a C kernel and its packed arguments; a segment is one call into the library."""

import ctypes
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from handgrad.backends.arena import HostArena
from handgrad.backends.base import Arena, Backend, Executable
from handgrad.backends.cpu.library import library, processor
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.core import limits
from handgrad.core.arguments import kernel_words
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.core.op import ONLY, Call, CpuKernel, MicroBatch, Op, resolve_number, resolve_pointer
from handgrad.core.plan import Plan
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Tensor

ENTRY_BYTES = 16  # Entry of kernel.h: function, arguments
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # that function


class CpuExecutable(Executable):
    """The bound list: for each kind of micro-batch the entries that hg_run executes, packed at their first use."""

    def __init__(self, program: Program, arena: HostArena, threads: int, comm: Comm):
        self.program, self.arena, self.threads, self._lib = program, arena, threads, library()
        self._comm = comm
        self._error: BaseException | None = None
        self._bound: dict[MicroBatch, tuple[np.ndarray, np.ndarray, list]] = {}
        self._entries(ONLY)  # so that errors are raised now, before anything runs

    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        segment = segment or Segment(0, len(self.program.calls))
        self._lib.set_threads(self.threads)  # scratch was planned for these; another backend may have set others
        address = self._entries(micro_batch).ctypes.data
        self._lib.run(address + ENTRY_BYTES * segment.start, segment.stop - segment.start)
        self._raise()

    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        segment = segment or Segment(0, len(self.program.calls))
        self._lib.set_threads(self.threads)
        address = self._entries(micro_batch).ctypes.data
        for i in range(segment.start, segment.stop):
            if micro_batch.runs(self.program.calls[i].when):
                seconds = np.zeros(1)
                self._lib.run_timed(address + ENTRY_BYTES * i, 1, seconds.ctypes.data)
                self._raise()
                after(self.program.calls[i], float(seconds[0]))

    def _raise(self) -> None:
        """Raises the error of an exchange between ranks. C cannot: the calls after it have run, on wrong values."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _exchange(self, c: Call, micro_batch: MicroBatch) -> Any:
        """The entry of a call that communicates: a function that C can call."""
        operands = self.arena.operands(c, self.program, micro_batch)

        def run(_: Any) -> None:
            if self._error is None:
                try:
                    self._comm.run(c, operands)
                except BaseException as error:
                    self._error = error

        return CALLBACK(run)

    def _entries(self, micro_batch: MicroBatch) -> np.ndarray:
        if micro_batch not in self._bound:
            calls = self.program.calls
            callbacks = {c: self._exchange(c, micro_batch) for c in calls if c.op.communicates}
            pack = partial(_pack, program=self.program, arena=self.arena, threads=self.threads, micro_batch=micro_batch)
            blocks = [[] if c in callbacks else pack(c) for c in calls]
            args = np.array([slot for block in blocks for slot in block] or [0], np.uint64)
            entries = np.zeros((len(blocks), 2), np.uint64)
            at = args.ctypes.data
            for i, (c, block) in enumerate(zip(calls, blocks)):
                runs = micro_batch.runs(c.when)
                function = self._lib.skip
                if runs and c in callbacks:
                    function = ctypes.cast(callbacks[c], ctypes.c_void_p).value
                elif runs:
                    function = self._lib.entry(_kernel(c).entry, c.dtype.name)
                assert function is not None, c.op
                entries[i] = function, at
                at += 8 * len(block)
            self._bound[micro_batch] = entries, args, list(callbacks.values())
        return self._bound[micro_batch][0]


def _kernel(c: Call) -> CpuKernel:
    """The declaration of a call's kernel; `CpuBackend.bind` has checked that there is one."""
    assert c.op.cpu is not None, c.op
    return c.op.cpu


def _pack(c: Call, program: Program, arena: HostArena, threads: int, micro_batch: MicroBatch) -> list[int]:
    """The arguments of a call as 8-byte integers in declaration order: the struct in arguments.h."""
    plan, slots = arena.plan, []
    pointers, numbers = kernel_words(_kernel(c).args)
    for word in pointers:
        tensor, offset = resolve_pointer(word, c)
        if tensor is None:
            slots.append(0)
        elif isinstance(tensor, Tensor):
            slots.append(arena.address + plan.offset[tensor] + offset)
        else:
            at = plan.offset[program.scalars] if tensor == "scalars" else plan.scratch.get(c, 0)
            slots.append(arena.address + at + offset)
    for word in numbers:
        value = threads if word == "threads" else resolve_number(word, c, micro_batch)
        bits = struct.pack("<d", value) if isinstance(value, float) else struct.pack("<q", value)
        slots.append(int.from_bytes(bits, "little"))
    return slots


class CpuBackend(Backend):
    """C kernels on `threads` threads (0: as many as `limits.threads` says, divided among the ranks of this machine).
    `isa` is the instruction set that they use.

    Raises HandgradError for more threads than can be started.
    """

    name = "cpu"
    head_rows = 512

    def __init__(self, threads: int = 0, comm: Comm = Alone()):
        self.comm = comm
        if whole("backend", "threads", threads) > limits.MAX_THREADS:
            rule = f"threads is at most {limits.MAX_THREADS}: every thread takes memory of its own"
            raise HandgradError("backend", rule, threads, hint=f"this process may use {limits.cpus()} CPUs")
        self._lib = library()
        wanted = threads or max(limits.threads() // comm.local_world, 1)
        self.threads = 1 + limits.startable(wanted - 1)
        if threads and self.threads < threads:
            rule = f"threads is at most {self.threads}, which this process can start now"
            raise HandgradError("backend", rule, threads, hint="ulimit -u, ulimit -v and the pids limit of a container")
        self.isa = self._lib.isa
        self.hardware = f"{processor()}, {self.threads} thread{'s' * (self.threads != 1)}, {self.isa}"

    def has(self, op: Op) -> bool:
        return op.cpu is not None or op.communicates

    def scratch(self, call: Call) -> int:
        spec = call.op.cpu.scratch if call.op.cpu else ""
        if not spec:
            return 0
        name, *words = spec.split()
        sizes = [self.threads if word == "threads" else int(resolve_number(word, call)) for word in words]
        return self._lib.scratch(name, call.dtype.name, sizes)

    def alloc(self, plan: Plan) -> HostArena:
        return HostArena(plan)

    def bind(self, program: Program, arena: Arena) -> CpuExecutable:
        assert isinstance(arena, HostArena)
        for c in program.calls:
            if c.op.communicates:
                continue
            kernel = c.op.cpu
            if kernel is None or self._lib.entry(kernel.entry, program.dtype.name) is None:
                rule = f"op '{c.op.name}' has no cpu kernel for {program.dtype}"
                raise HandgradError("bind", rule, context=f"called at {c.where}", hint="handgrad ops lists them")
            self._lib.check_arguments(kernel.entry, kernel.args)
        return CpuExecutable(program, arena, self.threads, self.comm)
