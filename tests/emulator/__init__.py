"""The CUDA form of every op on the CPU: Launches of an op run on a host arena, so that check_op judges them with no GPU.

    python -m tests.emulator add_norm             every case of the op, f32 and bf16, against the float64 oracle
    python -m tests.emulator add_norm --verbose   error / tolerance of each output
    python -m tests.emulator                      all ops
    pytest tests/test_cuda_emulated.py -k norm    the same, in both orders of the threads

in the repository's root. A case runs in every variant that launches something else (`variants`): without cuDNN,
deterministic, on a small GPU, with the last alternative of a call.

g++ compiles kernels as plain C++ (HG_HOST, emulator.h) and keeps them in a cache; each thread of a block is a fibre
(runtime.cc says what it catches). A fault raises KernelFault with the kernel's name, block, thread and source line.
Outputs and scratch are NaN before a call. With `reverse`, threads, warps and blocks run in the opposite order: a kernel
without races gives the same bits.

What it cannot run: the wgmma kernels, which are written in Hopper's own instructions (attention/*_wgmma.cu,
lm_loss/exp_gemm.cu, linear/weight_gradient.cu). For these, attention uses the oracle, and the two GEMMs have numpy
counterparts (STAND_INS), so that the kernels around them still run. Library GEMMs are numpy's in float32, library
attention (Sdpa) is the oracle's. Only a Hopper GPU tests the wgmma kernels (tests/test_gpu.py).
"""

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from handgrad import backends
from handgrad.backends.arena import NUMPY, HostArena
from handgrad.backends.base import Backend, Executable
from handgrad.backends.cuda.planner import GPUS, describe
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.backends.ref import RefBackend
from handgrad.core.arguments import kernel_words
from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY, Call, Case, MicroBatch, Op, resolve_number, resolve_pointer
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Tensor
from handgrad.launch import Collective, Gemm, Gpu, Kernel, Launches, Sdpa, pointer_word, type_defines
from handgrad.ops.act import Act
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
ONE_AT_A_TIME = threading.Lock()  # the runtime has one set of fibres; ranks of a test are threads
TYPES = {"f64": np.float64, **NUMPY}  # of a collective
H100, SMALL = GPUS["h100"], describe("sm_89", 3, 99 << 10, 8 << 20, has_library_attention=False)


class Variant(NamedTuple):
    """A GPU, and which of a call's alternatives is bound on it."""

    gpu: Gpu = H100
    alternative: int = 0  # -1: the last


class KernelFault(AssertionError):
    """A kernel did what the hardware does not define."""


class EmulatedBackend(Backend):
    """What the cuda backend binds in a variant, on the host."""

    name, hardware, head_rows, is_concurrent = "emulated", "fibres", 512, True

    def __init__(self, variant: Variant = Variant(), reverse: bool = False, comm: Comm = Alone()):
        self.variant, self.gpu, self.reverse, self.comm = variant, variant.gpu, reverse, comm

    def has(self, op: Op) -> bool:
        return type(op).cuda is not Op.cuda

    def scratch(self, call: Call) -> int:
        return launched(call, self.variant).scratch

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
        launches = [launched(c, backend.variant) for c in program.calls]
        kernels = {
            source(step, c): None
            for c, todo in zip(program.calls, launches)
            for step in todo.steps
            if is_emulated(step, c)
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.libraries = dict(zip(kernels, pool.map(library, kernels)))
        self.launches = launches
        self.steps: dict[MicroBatch, list[list[Callable[[], None]]]] = {}
        self._bind_all(ONLY)
        self.scratch_bytes = [todo.scratch for todo in launches]

    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        self.run_each(lambda c, seconds: None, segment, micro_batch)

    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        segment = segment or Segment(0, len(self.program.calls))
        self._bind_all(micro_batch)
        for i in range(segment.start, segment.stop):
            c = self.program.calls[i]
            if micro_batch.runs(c.when):
                begin = time.perf_counter()
                self._poison(c, self.scratch_bytes[i])
                for step in self.steps[micro_batch][i]:
                    step()
                after(c, time.perf_counter() - begin)

    def _bind_all(self, micro_batch: MicroBatch) -> None:
        if micro_batch not in self.steps:
            self.steps[micro_batch] = [
                [self._bind(step, c, i, micro_batch) for step in todo.steps]
                for i, (c, todo) in enumerate(zip(self.program.calls, self.launches))
            ]

    def _poison(self, c: Call, scratch: int) -> None:
        """Makes all that the call must write before it reads NaN."""
        for arg, out in zip(c.op.out_args, c.outs):
            if out is not None and not arg.inout:
                self.arena.view(out).view(np.uint8)[...] = NAN
        if scratch:
            at = self.arena.plan.scratch[c]
            self.arena.bytes[at : at + scratch] = NAN

    def _bind(
        self, step: Kernel | Gemm | Sdpa | Collective, c: Call, i: int, micro_batch: MicroBatch
    ) -> Callable[[], None]:
        if is_emulated(step, c):
            return self._kernel(step, c, micro_batch)
        if isinstance(step, Gemm):
            return self._gemm(step, c, micro_batch)
        if isinstance(step, Collective):
            return lambda: self._collective(step, c)
        if isinstance(step, Kernel) and step.entry in STAND_INS:
            return lambda: STAND_INS[step.entry](self, step, c, micro_batch)
        return lambda: self.oracle.run(Segment(i, i + 1), micro_batch)

    def _at(self, word: str, c: Call) -> tuple[int | None, Tensor | None]:
        """Where a pointer's word points, in bytes from the arena's start, and the tensor there; (None, None): nowhere."""
        what, offset = resolve_pointer(pointer_word(word), c)
        if what is None:
            return None, None
        plan = self.arena.plan
        start = (
            plan.scratch[c] if what == "scratch" else plan.offset[self.program.scalars if what == "scalars" else what]
        )
        return start + offset, what if isinstance(what, Tensor) else None

    # kernels --------------------------------------------------------------------------------------------------------

    def _kernel(self, k: Kernel, c: Call, micro_batch: MicroBatch) -> Callable[[], None]:
        gpu, grid = self.backend.gpu, (k.grid, 1, 1) if isinstance(k.grid, int) else k.grid
        where = f"{k.entry} of {c.op.name} {c.sizes}"
        assert 0 < k.block <= 1024 and k.shared <= gpu.shared_bytes, (
            f"{where}: block {k.block}, {k.shared} bytes of shared memory"
        )
        assert len(grid) == 3 and all(0 < n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535))), (
            f"{where}: grid {grid}"
        )
        pointers, numbers = kernel_words(k.args)
        slots, kinds = [], ""
        for word in pointers:
            at, _ = self._at(word, c)
            slots.append(struct.pack("<Q", 0 if at is None else self.arena.address + at))
            kinds += "p"
        for word in numbers:
            value = resolve_number(word, c, micro_batch)
            slots.append(struct.pack("<f4x", value) if isinstance(value, float) else struct.pack("<q", value))
            kinds += "f" if isinstance(value, float) else "i"
        check_signature((c.op.folder / k.file).read_text(), k.entry, kinds)
        lib = self.libraries[source(k, c)]
        entry, packed = lib.entry(k.entry), np.frombuffer(b"".join(slots) or bytes(8), np.uint64)
        floats = sum(1 << i for i, kind in enumerate(kinds) if kind == "f")

        def run() -> None:
            with ONE_AT_A_TIME:
                fault = lib.launch(entry, packed, len(slots), floats, grid, k.block, k.shared, self.backend.reverse)
            if fault:
                raise KernelFault(f"{where}, defines {k.defines}, grid {grid}, block {k.block}: {fault}")

        return run

    # collectives ----------------------------------------------------------------------------------------------------

    def _collective(self, step: Collective, c: Call) -> None:
        """What NCCL does, in place where it would, by the engine of the backend."""
        world, comm, dtype = self.backend.comm.world, self.backend.comm, np.dtype(TYPES[step.dtype])
        shares = {"all_reduce": (1, 1), "reduce_scatter": (world, 1), "all_gather": (1, world)}[step.kind]
        send, receive = (self._span(w, c, n * step.count, dtype) for w, n in zip((step.send, step.receive), shares))
        if step.kind == "all_reduce":
            assert send is receive or np.shares_memory(send, receive), step
            if step.count == 1:
                receive[0] = comm.total(receive[0])
            else:
                comm.all_reduce(receive)
        elif step.kind == "reduce_scatter":
            comm.reduce_scatter(send, receive, False)
        else:
            comm.all_gather(send, receive)

    def _span(self, word: str, c: Call, count: int, dtype: np.dtype) -> np.ndarray:
        """The memory that a word of a collective names: whole elements inside its tensor."""
        at, tensor = self._at(word, c)
        whole = self.program.scalars if tensor is None else tensor
        start, nbytes = self.arena.plan.offset[whole], count * dtype.itemsize
        assert start <= at and at + nbytes <= start + whole.nbytes and at % dtype.itemsize == 0, (word, c)
        return self.arena.bytes[at : at + nbytes].view(dtype)

    # GEMMs ----------------------------------------------------------------------------------------------------------

    def matrix(self, word: str, c: Call, *shape: int) -> np.ndarray:
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

    def _gemm(self, g: Gemm, c: Call, micro_batch: MicroBatch) -> Callable[[], None]:
        each = () if g.batch == 1 else (g.batch,)
        a, b = (
            self.matrix(g.a, c, *each, *(g.k, g.m) if g.ta else (g.m, g.k)),
            self.matrix(g.b, c, *each, *(g.n, g.k) if g.tb else (g.k, g.n)),
        )
        out = self.matrix(g.out, c, *each, g.m, g.n)
        bias = self.matrix(g.bias, c, g.n) if g.bias and resolve_pointer(g.bias, c)[0] is not None else None
        aux = self.matrix(g.aux, c, g.m, g.n) if g.aux else None
        addend = self.matrix(g.addend, c, g.m, g.n) if g.addend else None
        assert not (g.addend and g.epilogue), g
        assert g.epilogue in ("", "bias", "gelu", "dgelu") and not (g.epilogue == "dgelu" and aux is None), g
        assert g.batch == 1 or g.epilogue == "", g

        def run() -> None:
            y = (a.mT if g.ta else a).astype(np.float32) @ (b.mT if g.tb else b).astype(np.float32)
            if bias is not None:
                y += bias.astype(np.float32)
            if resolve_number(g.accumulate, c, micro_batch):
                y += out.astype(np.float32)
            if addend is not None:
                y += addend.astype(np.float32)
            if g.epilogue == "gelu":
                if aux is not None:
                    aux[...] = y
                y = reference.act_forward(y, Act.GELU_TANH)
            elif g.epilogue == "dgelu":
                y = reference.act_backward(y, aux.astype(np.float32), Act.GELU_TANH)
            out[...] = y

        return run

    def floats(self, word: str, c: Call, *shape: int) -> np.ndarray:
        """The memory that a word names, as float32."""
        at, _ = self._at(word, c)
        return self.arena.bytes[at : at + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)


def exp_gemm(run: EmulatedExecutable, k: Kernel, c: Call, micro_batch: MicroBatch) -> None:
    """lm_loss/exp_gemm.cu: p = e^(x w' - shift), 0 from column `width` on, and row sums of each 256 columns."""
    (x, w, p, shift, sums), (M, N, K, width) = words(k, c, micro_batch)
    product = run.matrix(x, c, M, K).astype(np.float32) @ run.matrix(w, c, N, K).T.astype(np.float32)
    out = run.matrix(p, c, M, N)
    r = (product - run.floats(shift, c, M)[:, None]).astype(out.dtype).astype(np.float32)
    with np.errstate(over="ignore"):
        e = np.where(np.arange(N) < width, np.exp(r), 0)
        out[...] = e
        run.floats(sums, c, -(-N // 256), M)[...] = np.add.reduceat(e, np.arange(0, N, 256), axis=1).T


def weight_gradient(run: EmulatedExecutable, k: Kernel, c: Call, micro_batch: MicroBatch) -> None:
    """linear/weight_gradient.cu: dw = or += dy' x, split tiles included."""
    (dy, x, dw, *_), (M, N, K, _, accumulate) = words(k, c, micro_batch)
    product = run.matrix(dy, c, K, M).T.astype(np.float32) @ run.matrix(x, c, K, N).astype(np.float32)
    add(run.matrix(dw, c, M, N), product, accumulate)


def weight_gradient_reduce(run: EmulatedExecutable, k: Kernel, c: Call, micro_batch: MicroBatch) -> None:
    """linear/weight_gradient.cu: db = or += the row sums of dy'."""
    (_, db, *_), (M, _, K, _, _, _, accumulate) = words(k, c, micro_batch)
    add(run.matrix(db, c, M), run.matrix("dy", c, K, M).astype(np.float32).sum(0), accumulate)


STAND_INS = {
    "lm_loss_exp_gemm_kernel": exp_gemm,
    "linear_weight_gradient_kernel": weight_gradient,
    "linear_weight_gradient_reduce_kernel": weight_gradient_reduce,
}


def words(k: Kernel, c: Call, micro_batch: MicroBatch) -> tuple[list[str], list[int]]:
    """The pointers' words and the numbers of a launch."""
    pointers, numbers = kernel_words(k.args)
    return pointers, [resolve_number(word, c, micro_batch) for word in numbers]


def add(to: np.ndarray, values: np.ndarray, accumulate: int) -> None:
    """to = or += values."""
    to[...] = values + to.astype(np.float32) if accumulate else values


def variants(op: Op, case: Case, dtype: DType) -> dict[str, Variant]:
    """By name: the variants in which a case launches something different. A small GPU may lack the shared memory."""
    wanted = {
        "": Variant(),
        "deterministic": Variant(replace(H100, deterministic=True)),
        "no cudnn": Variant(replace(H100, has_library_attention=False)),
        "small": Variant(SMALL),
        "last alternative": Variant(alternative=-1),
    }
    seen: list[tuple] = []
    for name, variant in list(wanted.items()):
        try:
            steps = launched(case_program(op, case, dtype)[1], variant).steps
        except HandgradError:
            assert name == "small", name
            steps = ()
        if not steps or steps in seen:
            del wanted[name]
        seen.append(steps)
    return wanted


def is_emulated(step: Kernel | Gemm | Sdpa | Collective, c: Call) -> bool:
    """Whether a step runs as the kernel that it is: all but library calls and wgmma kernels."""
    return isinstance(step, Kernel) and '#include "wgmma' not in (c.op.folder / step.file).read_text()


def launched(c: Call, variant: Variant) -> Launches:
    """The launches that a variant binds."""
    return c.op.cuda(c, variant.gpu).alternatives()[variant.alternative]


# compiling ----------------------------------------------------------------------------------------------------------


def source(k: Kernel, c: Call) -> tuple[Path, tuple[str, ...]]:
    """What is compiled for a launch: the file and its defines."""
    defines = type_defines(c) | k.defines
    return c.op.folder / k.file, tuple(sorted(f"-D{name}={value}" for name, value in defines.items()))


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
        own = sorted([*file.parent.glob("*.cu*"), *file.parent.glob("*.h")])
        texts = [*own, *sorted(INCLUDE.glob("*.cuh")), HERE / "emulator.h"]
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
