"""The CUDA form of every op on the CPU: Launches of an op run on a host arena, so that check_op judges them with no GPU.

    python -m tests.emulator add_norm             every case of the op, f32 and bf16, against the float64 oracle
    python -m tests.emulator add_norm --verbose   error / tolerance of each output
    python -m tests.emulator                      all ops
    pytest tests/test_cuda_emulated.py -k norm    the same, in both orders of the threads

in the repository's root. A case runs on several cards where they launch something else (`cards`): without cuDNN,
deterministic, small.

Kernels are compiled by g++ as plain C++ (HG_HOST, emulator.h) and kept in a cache; each thread of a block is a fibre
(runtime.cc, which says what is caught there). A fault raises KernelFault with the kernel's name, block, thread and
source line. Products (Gemm) are numpy's in float32; attention by the library (Sdpa) and
kernels for Hopper (files hopper_*.cu), whose instructions are not emulated, are the oracle's. Outputs and
scratch are NaN before a call. With `reverse`, threads, warps and blocks run the other way round: a kernel that owes
nothing to luck gives the same bits.
"""

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from handgrad import backends
from handgrad.backends.arena import NUMPY, HostArena
from handgrad.backends.base import Backend, Executable
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, DType
from handgrad.core.launch import Gemm, Gpu, Kernel, Launches, Sdpa, number, place
from handgrad.core.op import Call, Case, Op
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.ops.linear import reference
from handgrad.testing import case_program

HERE = Path(__file__).parent
INCLUDE = Path(backends.__file__).parent / "cuda" / "include"
CACHE = Path(tempfile.gettempdir()) / f"handgrad-emulator-{os.getuid()}"
TRAPS = "alignment,bounds,integer-divide-by-zero"  # what g++ checks at run time
FLAGS = (
    "g++ -std=gnu++17 -O1 -fPIC -shared -nostartfiles -fvisibility=hidden -fno-gnu-unique -U_FORTIFY_SOURCE -g1 -fno-strict-aliasing -fno-trapping-math -fno-math-errno "
    f"-ftrivial-auto-var-init=pattern -fsanitize={TRAPS} -fsanitize-undefined-trap-on-error -DHG_HOST=1"
).split()
NAN = 0xFF  # a byte of NaN in f32 and in bf16


LAST_WAY = "last way"  # the name of a card that is slow at all ways but the last


class KernelFault(AssertionError):
    """A kernel did what the hardware does not define."""


class EmulatedBackend(Backend):
    """What the cuda backend binds on `gpu`, on the host."""

    name, hardware, head_rows, head_bytes = "emulated", "fibres", 512, 512 * 50304 * 4

    def __init__(self, gpu: Gpu | None = None, reverse: bool = False):
        self.gpu, self.reverse = gpu or Gpu(), reverse

    def has(self, op: Op) -> bool:
        return type(op).cuda is not Op.cuda

    def scratch(self, call: Call) -> int:
        return launched(call, self.gpu).scratch

    def alloc(self, plan) -> HostArena:
        return HostArena(plan)

    def bind(self, program: Program, arena: HostArena) -> "EmulatedExecutable":
        return EmulatedExecutable(program, arena, self)


class EmulatedExecutable(Executable):
    """The steps of every call as Python functions."""

    def __init__(self, program: Program, arena: HostArena, backend: EmulatedBackend):
        self.program, self.arena, self.backend = program, arena, backend
        self.scalars = arena.scalars(program)
        self.oracle = RefBackend(exact=False).bind(program, arena)
        launches = [launched(c, backend.gpu) for c in program.calls]
        kernels = {
            source(step, c): None
            for c, todo in zip(program.calls, launches)
            for step in todo.steps
            if is_emulated(step)
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.libraries = dict(zip(kernels, pool.map(library, kernels)))
        self.steps = [
            [self._bind(step, c, i) for step in todo.steps] for i, (c, todo) in enumerate(zip(program.calls, launches))
        ]
        self.room = [todo.scratch for todo in launches]

    def run(self, start: int = 0, stop: int | None = None) -> None:
        self.run_each(lambda c, seconds: None, start, stop)

    def run_each(self, after: Callable[[Call, float], None], start: int = 0, stop: int | None = None) -> None:
        for i, c in list(enumerate(self.program.calls))[start:stop]:
            begin = time.perf_counter()
            self._poison(c, self.room[i])
            for step in self.steps[i]:
                step()
            after(c, time.perf_counter() - begin)

    def _poison(self, c: Call, room: int) -> None:
        """Makes all that the call must write before it reads NaN."""
        for arg, out in zip(c.op.out_args, c.outs):
            if out is not None and not arg.inout:
                self.arena.view(out).view(np.uint8)[...] = NAN
        if room:
            at = self.arena.plan.scratch[c]
            self.arena.bytes[at : at + room] = NAN

    def _bind(self, step: Kernel | Gemm | Sdpa, c: Call, i: int) -> Callable[[], None]:
        if is_emulated(step):
            return self._kernel(step, c)
        if isinstance(step, Gemm):
            return self._gemm(step, c)
        return lambda: self.oracle.run(i, i + 1)

    def _at(self, word: str, c: Call) -> tuple[int | None, Tensor | None]:
        """Where a pointer's word points, in bytes from the arena's start, and the tensor there; (None, None): nowhere."""
        what, offset = place(word, c)
        if what is None:
            return None, None
        plan = self.arena.plan
        start = (
            plan.scratch[c] if what == "scratch" else plan.offset[self.program.scalars if what == "scalars" else what]
        )
        return start + offset, what if isinstance(what, Tensor) else None

    # kernels --------------------------------------------------------------------------------------------------------

    def _kernel(self, k: Kernel, c: Call) -> Callable[[], None]:
        gpu, grid = self.backend.gpu, (k.grid, 1, 1) if isinstance(k.grid, int) else k.grid
        where = f"{k.entry} of {c.op.name} {c.sizes}"
        assert 0 < k.block <= 1024 and k.shared <= gpu.shared, (
            f"{where}: block {k.block}, {k.shared} bytes of shared memory"
        )
        assert len(grid) == 3 and all(0 < n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535))), (
            f"{where}: grid {grid}"
        )
        pointers, _, numbers = k.args.partition("|")
        slots, kinds = [], ""
        for word in pointers.split():
            at, _ = self._at(word, c)
            slots.append(struct.pack("<Q", 0 if at is None else self.arena.address + at))
            kinds += "p"
        for word in numbers.split():
            value = number(word, c)
            slots.append(struct.pack("<f4x", value) if isinstance(value, float) else struct.pack("<q", value))
            kinds += "f" if isinstance(value, float) else "i"
        check_signature((c.op.folder / k.file).read_text(), k.entry, kinds)
        lib = self.libraries[source(k, c)]
        entry, packed = lib.entry(k.entry), np.frombuffer(b"".join(slots) or bytes(8), np.uint64)
        floats = sum(1 << i for i, kind in enumerate(kinds) if kind == "f")

        def run() -> None:
            fault = lib.launch(entry, packed, len(slots), floats, grid, k.block, k.shared, self.backend.reverse)
            if fault:
                raise KernelFault(f"{where}, defines {k.defines}, grid {grid}, block {k.block}: {fault}")

        return run

    # products -------------------------------------------------------------------------------------------------------

    def _matrix(self, word: str, c: Call, *shape: int) -> np.ndarray:
        """The memory that a word names, as a matrix; scratch holds the working dtype."""
        at, tensor = self._at(word, c)
        dtype = c.dtype if tensor is None else tensor.dtype
        nbytes = int(np.prod(shape)) * dtype.size
        if tensor is not None:
            assert at + nbytes <= self.arena.plan.offset[tensor] + tensor.nbytes, (
                f"Gemm of {c.op.name}: {word} is larger than {tensor}"
            )
        else:
            assert at + nbytes <= self.arena.plan.scratch[c] + self.backend.scratch(c), (
                f"Gemm of {c.op.name}: {word} leaves the scratch"
            )
        return self.arena.bytes[at : at + nbytes].view(NUMPY[dtype.name]).reshape(shape)

    def _gemm(self, g: Gemm, c: Call) -> Callable[[], None]:
        a, b = (
            self._matrix(g.a, c, *(g.k, g.m) if g.ta else (g.m, g.k)),
            self._matrix(g.b, c, *(g.n, g.k) if g.tb else (g.k, g.n)),
        )
        out = self._matrix(g.out, c, g.m, g.n)
        if g.epilogue == "exp":
            return self._exponentials(g, c, a, b, out)
        sums = self._matrix(g.sums, c, g.m) if g.sums else None
        bias = self._matrix(g.bias, c, g.n) if g.bias and place(g.bias, c)[0] is not None else None
        aux = self._matrix(g.aux, c, g.m, g.n) if g.aux else None
        assert g.epilogue in ("", "bias", "gelu", "dgelu") and not (g.epilogue == "dgelu" and aux is None), g

        def run() -> None:
            y = (a.T if g.ta else a).astype(np.float32) @ (b.T if g.tb else b).astype(np.float32)
            if bias is not None:
                y += bias.astype(np.float32)
            adds = g.adds is True or g.adds and (g.adds not in c.first or self.scalars.micro_step > 0)
            if adds:
                y += out.astype(np.float32)
            if sums is not None:
                rows = a.astype(np.float32).sum(0 if g.ta else 1)
                sums[...] = rows + sums.astype(np.float32) if adds else rows
            if g.epilogue == "gelu":
                if aux is not None:
                    aux[...] = y
                y = reference.gelu(y)
            elif g.epilogue == "dgelu":
                y = reference.gelu_backward(y, aux.astype(np.float32))
            out[...] = y

        return run

    def _exponentials(self, g: Gemm, c: Call, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], None]:
        def floats(word: str, *shape: int) -> np.ndarray:
            at, _ = self._at(word, c)
            return self.arena.bytes[at : at + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)

        shift, sums = floats(g.bias, g.m), floats(g.sums, -(-g.n // 256), g.m)

        def run() -> None:
            r = (a.astype(np.float32) @ b.T.astype(np.float32) - shift[:, None]).astype(out.dtype).astype(np.float32)
            with np.errstate(over="ignore"):
                e = np.where(np.arange(g.n) < g.width, np.exp(r), 0)
                out[...] = e
                sums[...] = np.add.reduceat(e, np.arange(0, g.n, 256), axis=1).T

        return run


def cards(op: Op, case: Case, dtype: DType) -> dict[str, Gpu]:
    """The cards, by a name for what they are, on which a case launches something different."""
    wanted = {
        "": Gpu(),
        "deterministic": Gpu(deterministic=True),
        "no cudnn": Gpu(cudnn=False),
        "small": Gpu("small", "sm_89", sms=3, shared=99 << 10, cudnn=False),
        LAST_WAY: Gpu(LAST_WAY),
    }
    seen: list[tuple] = []
    for name, gpu in list(wanted.items()):
        steps = launched(case_program(op, case, dtype)[1], gpu).steps
        if steps in seen:
            del wanted[name]
        seen.append(steps)
    return wanted


def is_emulated(step: Kernel | Gemm | Sdpa) -> bool:
    """Whether a step runs as the kernel that it is."""
    return isinstance(step, Kernel) and not step.file.startswith("hopper_")


def launched(c: Call, gpu: Gpu) -> Launches:
    """What runs: the first way, or the last on a card of that name."""
    return c.op.cuda(c, gpu).ways()[-1 if gpu.name == LAST_WAY else 0]


# compiling ----------------------------------------------------------------------------------------------------------


def source(k: Kernel, c: Call) -> tuple[Path, tuple[str, ...]]:
    """What is compiled for a launch: the file and its defines."""
    tensors = (*zip(c.op.in_args, c.ins), *zip(c.op.out_args, c.outs))
    types = {
        "HG_BF16": int(c.dtype is BF16),
        "HG_GRAD_BF16": int(any(a.kind == "grad" and t and t.dtype is BF16 for a, t in tensors)),
    }
    return c.op.folder / k.file, tuple(sorted(f"-D{name}={value}" for name, value in (types | k.defines).items()))


def check_signature(text: str, entry: str, kinds: str) -> None:
    """Asserts that the kernel's parameters, as they are written, are the ones that the launch passes."""
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    found = re.findall(rf"\b{entry}\s*\(([^)]*)\)\s*{{", text)
    written = [
        "".join("p" if "*" in p else "f" if "float" in p else "i" for p in params.split(",")) for params in found
    ]
    assert not written or kinds in written, (
        f"{entry} takes {' or '.join(written)} (p pointer, i whole number, f float), the launch passes {kinds}"
    )


def build(command: list[str], name: str, text: str) -> Path:
    """The library that a command makes, kept under a key of its options and of all text that it reads."""
    options = [word for word in command if "/" not in word]  # where the text lies does not matter
    key = hashlib.sha256("\0".join([*options, text]).encode()).hexdigest()[:24]
    path = CACHE / f"{name}-{key}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = CACHE / f"{uuid.uuid4()}.part"  # several processes and threads may be at it
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        os.replace(part, path)
    return path


@cache
def runtime() -> ctypes.CDLL:
    """The fibres, opened so that kernels find them."""
    command = [word for word in FLAGS if not word.startswith(("-fsan", "-ftriv", "-fvis", "-nostart", "-O"))]
    text = "".join((HERE / name).read_text() for name in ("emulator.h", "runtime.cc"))
    lib = ctypes.CDLL(str(build([*command, "-O2", str(HERE / "runtime.cc")], "runtime", text)), ctypes.RTLD_GLOBAL)
    lib.emulator_launch.restype = ctypes.c_char_p
    return lib


@cache
def library(key: tuple[Path, tuple[str, ...]]) -> "Library":
    """The compiled file under these defines."""
    return Library(*key)


class Library:
    """One cuda.cu, compiled for the host."""

    def __init__(self, file: Path, defines: tuple[str, ...]):
        texts = [*sorted(file.parent.glob("*.cu*")), *sorted(INCLUDE.glob("*.cuh")), HERE / "emulator.h"]
        text = "".join(path.read_text() for path in texts)
        command = [*FLAGS, *defines, f"-I{INCLUDE}", f"-I{HERE}", f"-I{file.parent}", "-x", "c++", str(file)]
        self.runtime, self.file = runtime(), file
        self.path = build(command, f"{file.parent.name}-{file.stem}", text)
        self.dll = ctypes.CDLL(str(self.path))
        start, size = ctypes.c_void_p(), ctypes.c_uint64()
        self.dll.emulator_static_shared(ctypes.byref(start), ctypes.byref(size))
        self.static = start, size

    def entry(self, name: str) -> ctypes.c_void_p:
        """The address of a kernel."""
        assert hasattr(self.dll, name), f"{self.file} has no kernel '{name}' under these defines"
        return ctypes.cast(getattr(self.dll, name), ctypes.c_void_p)

    def launch(
        self,
        entry: ctypes.c_void_p,
        slots: np.ndarray,
        num_slots: int,
        floats: int,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        reverse: bool,
    ) -> str:
        """Runs a grid; returns what went wrong, or nothing."""
        at = ctypes.c_void_p()
        said = self.runtime.emulator_launch(
            entry,
            ctypes.c_void_p(slots.ctypes.data),
            num_slots,
            ctypes.c_uint64(floats),
            (ctypes.c_uint * 3)(*grid),
            block,
            ctypes.c_uint64(shared),
            *self.static,
            int(reverse),
            ctypes.byref(at),
        )
        return "" if said is None else said.decode() + (self._line(at.value) if at.value else "")

    def _line(self, instruction: int) -> str:
        """The source line of an instruction, innermost first."""
        base = next(
            (
                int(line.split("-")[0], 16)
                for line in Path("/proc/self/maps").read_text().splitlines()
                if line.endswith(self.path.name)
            ),
            None,
        )
        if base is None:
            return ""
        lines = subprocess.run(
            ["addr2line", "-i", "-e", str(self.path), hex(instruction - base)], capture_output=True, text=True
        ).stdout.split("\n")
        return " at " + ", called from ".join(Path(line.split(" ")[0]).name for line in lines if line)
