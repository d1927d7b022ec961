"""cpu: binds every call to a C kernel with one packed block of arguments; a step is one call into the library."""

import struct
from collections.abc import Callable

import numpy as np

from handgrad.backends.arena import HostArena
from handgrad.backends.base import Arena, Backend, Executable
from handgrad.backends.cpu.library import library, physical_threads, processor
from handgrad.core.errors import HandgradError
from handgrad.core.op import Op
from handgrad.core.plan import Plan
from handgrad.core.program import Call, Program

ENTRY_BYTES = 16  # Entry of kernel.h: function, arguments


class CpuExecutable(Executable):
    """The bound list: `entries` is what hg_run walks."""

    def __init__(self, program: Program, arena: HostArena, threads: int):
        self.program, self.arena, self.threads, self._lib = program, arena, threads, library()
        blocks = [_pack(c, program, arena, threads) for c in program.calls]
        self._args = np.array([slot for block in blocks for slot in block] or [0], np.uint64)
        self._entries = np.zeros((len(blocks), 2), np.uint64)
        at = self._args.ctypes.data
        for i, (c, block) in enumerate(zip(program.calls, blocks)):
            self._entries[i] = self._lib.entry(c.op.cpu.entry, program.dtype.name), at
            at += 8 * len(block)
        self._address = self._entries.ctypes.data

    def run(self, start: int = 0, stop: int | None = None) -> None:
        stop = len(self._entries) if stop is None else stop
        self._lib.set_threads(self.threads)  # scratch was planned for as many, whatever other backends are open
        self._lib.run(self._address + ENTRY_BYTES * start, stop - start)

    def run_each(self, after: Callable[[Call, float], None], start: int = 0, stop: int | None = None) -> None:
        self._lib.set_threads(self.threads)
        for i in range(start, len(self._entries) if stop is None else stop):
            seconds = np.zeros(1)
            self._lib.run_timed(self._address + ENTRY_BYTES * i, 1, seconds.ctypes.data)
            after(self.program.calls[i], float(seconds[0]))


def _pack(c: Call, program: Program, arena: HostArena, threads: int) -> list[int]:
    """The 8-byte slots of one call, in the order of its declaration."""
    plan, slots = arena.plan, []
    tensors = {arg.name: t for args, ts in ((c.op.in_args, c.ins), (c.op.out_args, c.outs)) for arg, t in zip(args, ts)}
    pointers = {"scalars": plan.offset[program.scalars], "scratch": plan.scratch.get(c)}
    for word in c.op.cpu.args.replace("|", " ").split():
        if word in tensors or word in pointers:
            offset = (
                pointers[word] if word in pointers else None if tensors[word] is None else plan.offset[tensors[word]]
            )
            slots.append(0 if offset is None else arena.address + offset)
        elif word.startswith("acc."):
            slots.append(int(word[4:] not in c.first))
        else:
            value = threads if word == "threads" else c.sizes[word] if word in c.sizes else c.attrs[word]
            bits = struct.pack("<d", value) if isinstance(value, float) else struct.pack("<q", int(value))
            slots.append(int.from_bytes(bits, "little"))
    return slots


class CpuBackend(Backend):
    """C kernels on `threads` threads (default: physical cores). `isa` says which instruction set was taken."""

    name, head_rows, head_bytes = "cpu", 512, 512 * 50304 * 4

    def __init__(self, threads: int = 0):
        self._lib = library()
        self.threads = threads or physical_threads()
        self.isa = self._lib.isa
        self.hardware = f"{processor()}, {self.threads} thread{'s' * (self.threads != 1)}, {self.isa}"

    def has(self, op: Op) -> bool:
        return op.cpu is not None

    def scratch(self, call: Call) -> int:
        spec = call.op.cpu.scratch if call.op.cpu else ""
        if not spec:
            return 0
        name, *words = spec.split()
        sizes = [self.threads if w == "threads" else call.sizes.get(w, call.attrs.get(w)) for w in words]
        return self._lib.scratch(name, call.dtype.name, sizes)

    def alloc(self, plan: Plan) -> Arena:
        return HostArena(plan)

    def bind(self, program: Program, arena: HostArena) -> CpuExecutable:
        for c in program.calls:
            if c.op.cpu is None or self._lib.entry(c.op.cpu.entry, program.dtype.name) is None:
                raise HandgradError(
                    "bind",
                    f"every op has a cpu kernel for {program.dtype}",
                    f"none for '{c.op.name}'",
                    context=f"called at {c.where}",
                    hint="handgrad ops",
                )
        return CpuExecutable(program, arena, self.threads)
