"""cuda: binds every call to the launches that its op declares; a stretch of the list becomes one graph."""

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from handgrad.backends.base import Arena, Backend, Executable
from handgrad.backends.cuda import cudnn as attention
from handgrad.backends.cuda import hopper
from handgrad.backends.cuda.arena import CudaArena
from handgrad.backends.cuda.card import Card
from handgrad.backends.cuda.cublaslt import CublasLt, Product
from handgrad.backends.cuda.driver import Device, Mark, Module, launcher, tensor_map
from handgrad.backends.cuda.graph import Graph, Graphs
from handgrad.backends.cuda.libraries import load
from handgrad.backends.cuda.nvrtc import Source, compile_all, compiler
from handgrad.backends.cuda.peaks import peaks
from handgrad.backends.cuda.tune import tune
from handgrad.backends.cuda.ways import Place, Ways
from handgrad.core.dtypes import BF16
from handgrad.core.errors import HandgradError
from handgrad.core.launch import Gemm, Gpu, Kernel, Launches, Sdpa, number, place, pointers
from handgrad.core.op import Call, Op
from handgrad.core.plan import Plan, aligned
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor

Start = Callable[[bool], None]  # begins one launch; the argument: whether this is the first micro-batch of a step
AHEAD = 4  # replays that may wait for their turn; behind some thousand kernels the driver lets the host spin


class CudaExecutable(Executable):
    """The bound list. A stretch runs launch by launch the first time, is captured the second, and replayed since."""

    def __init__(self, program: Program, arena: CudaArena, backend: "CudaBackend"):
        self.program, self.arena, self.device, self._capture = program, arena, backend.device, backend.graphs.capture
        ways = [(c, backend.launches(c)) for c in program.calls]
        compiled = compile_all([s for c, way in ways for s in backend.sources(c, way)])
        self._starts = [backend.bind_call(c, way, program, arena, compiled) for c, way in ways]
        self._fork, self._join = self.device.event(), self.device.event()
        self._graphs: dict[tuple[int, int, bool], Graph | None] = {}
        self._replays = deque(self.device.event(asleep=True) for _ in range(AHEAD))

    def run(self, start: int = 0, stop: int | None = None) -> None:
        stop = len(self._starts) if stop is None else stop
        key = start, stop, self._is_first()
        if key not in self._graphs:
            self._launch(*key)
            self._graphs[key] = None
            return
        graph = self._graphs[key] or self._capture(lambda: self._launch(*key))
        self._graphs[key] = graph
        self.device.wait(self._replays[0])
        graph.replay()
        self.device.record(self._replays[0])
        self._replays.rotate(-1)

    def run_each(self, after: Callable[[Call, float], None], start: int = 0, stop: int | None = None) -> None:
        begin, end, first = self.device.event(True), self.device.event(True), self._is_first()
        for i in range(start, len(self._starts) if stop is None else stop):
            self.device.record(begin)
            self._launch(i, i + 1, first)
            self.device.record(end)
            after(self.program.calls[i], self.device.seconds(begin, end))

    def _is_first(self) -> bool:
        return self.arena.written(self.program)["micro_step"][0] == 0

    def _launch(self, start: int, stop: int, first: bool) -> None:
        beside = False  # whether the side stream is at work
        for i in range(start, stop):
            if self.program.calls[i].op.beside:
                self.device.record(self._fork)
                self.device.follow(self._fork, self.device.side)
                for begin in self._starts[i]:
                    begin(first)
                self.device.record(self._join, self.device.side)
                beside = True
                if i + 1 < stop:
                    continue
            else:
                for begin in self._starts[i]:
                    begin(first)
            if beside:
                self.device.follow(self._join, self.device.stream)
                beside = False


class CudaBackend(Backend):
    """One card. tf32: float32 products on tensor cores, factors rounded to 10 bits. deterministic: the same bits
    whatever is recomputed, and no algorithm chosen by the clock."""

    name, head_rows, head_bytes, runs_beside = Card.name, Card.head_rows, Card.head_bytes, Card.runs_beside
    dtypes, grad_dtypes, is_asynchronous = ("f32", "tf32", "bf16"), ("f32", "bf16"), True
    cut = 16  # k of a tensor core's instruction

    def __init__(self, tf32: bool = False, deterministic: bool = False, cudnn: bool = True):
        with ThreadPoolExecutor(1) as pool:  # the driver makes its context meanwhile
            pool.submit(_open_libraries)
            self.device = Device()
        self.pci_bus = self.device.pci_bus
        self.graphs = Graphs(self.device)
        self._blas = CublasLt(self.graphs, deterministic)
        self._cudnn: attention.Cudnn | None = None  # opened where a call wants it
        self._modules: dict[bytes, Module] = {}
        has_cudnn = cudnn and attention.library() is not None
        self.gpu = self.device.describe(cudnn=has_cudnn, tf32=tf32, deterministic=deterministic)
        self._card = Card(self.gpu)
        self._ways = Ways(self.graphs, self._card, self._blas.version)
        self.hardware = (
            f"{self.gpu.name}, driver for CUDA {self.device.version // 1000}.{self.device.version % 1000 // 10}"
        )

    def has(self, op: Op) -> bool:
        return self._card.has(op)

    def scratch(self, call: Call) -> int:
        return self._card.scratch(call)

    def note(self, call: Call) -> str:
        return self.launches(call).note

    def mark(self) -> Mark:
        mark = Mark()
        self.device.record(mark.event)
        return mark

    def seconds(self, begin: Mark, end: Mark) -> float:
        return self.device.seconds(begin.event, end.event)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s that the card can do in this dtype ("bf16", "tf32", "f32"): its data sheet's, or measured."""
        known = peaks(self.gpu.name)
        if known is not None:
            return getattr(known, dtype) * 1e12
        return self._blas.peak("bf16" if dtype == "bf16" else "f32", dtype == "tf32")

    def alloc(self, plan: Plan) -> Arena:
        calls = [c for program in plan.programs for c in program.calls]
        undecided = self._ways.open(calls)
        ways = [(c, self.launches(c)) for c in calls] + [(c, way) for c in undecided.values() for way in self._all(c)]
        with ThreadPoolExecutor(1) as pool:  # compilers are other processes, and tuning needs the card alone
            compiling = pool.submit(compile_all, [s for c, way in ways for s in self.sources(c, way)])
            tune(self._blas, [p for c in calls for p in self._products(c)])  # before the memory is taken
        compiled = compiling.result()
        bind = partial(self._bind, compiled=compiled, stream=self.device.stream)
        self._ways.race(undecided, bind, self.scratch)
        return CudaArena(self.device, plan)

    def bind(self, program: Program, arena: CudaArena) -> CudaExecutable:
        for c in program.calls:
            if not self.has(c.op):
                rule, context = "every op has a cuda form", f"called at {c.where}"
                raise HandgradError("bind", rule, f"none for '{c.op.name}'", context=context, hint="handgrad ops")
        return CudaExecutable(program, arena, self)

    # one call -------------------------------------------------------------------------------------------------------

    def launches(self, c: Call) -> Launches:
        """What is bound for a call."""
        return self._ways.chosen(c)

    def _all(self, c: Call) -> tuple[Launches, ...]:
        return self._card.launches(c).ways()

    def sources(self, c: Call, way: Launches) -> list[Source]:
        """What must be compiled for a call."""
        return [source(s, c, self.gpu) for s in way.steps if isinstance(s, Kernel) or _is_own(s)]

    def _products(self, c: Call) -> list[Product]:
        steps = [s for way in self._all(c) for s in way.steps if isinstance(s, Gemm) and not _is_own(s)]
        return list(dict.fromkeys(product(s, c, self.gpu) for s in steps))

    def bind_call(
        self, c: Call, way: Launches, program: Program, arena: CudaArena, compiled: dict[Source, bytes]
    ) -> list[Start]:
        """What starts each launch of a call."""
        plan = arena.plan

        def at(tensor: Tensor | str) -> int:
            if tensor == "scratch":
                return arena.address + plan.scratch.get(c, 0)
            return arena.address + plan.offset[program.scalars if tensor == "scalars" else tensor]

        stream = self.device.side if c.op.beside else self.device.stream
        return self._bind(c, way, at, compiled=compiled, stream=stream)

    def _bind(
        self, c: Call, launches: Launches, at: Place, *, compiled: dict[Source, bytes], stream: Any
    ) -> list[Start]:
        def address(word: str) -> int:
            tensor, offset = place(word, c)
            return 0 if tensor is None else at(tensor) + offset

        workspace = at("scratch") + aligned(launches.scratch)
        starts: list[Start] = []
        for step in launches.steps:
            if isinstance(step, Kernel):
                starts.append(self._bind_kernel(step, c, stream, address, compiled[source(step, c, self.gpu)]))
            elif _is_own(step):
                module = self._module(compiled[source(step, c, self.gpu)])
                start = hopper.bind(step, c, self.gpu, module, address, workspace, stream)
                starts.append(lambda first, start=start: start())
            elif isinstance(step, Gemm):
                starts.append(self._bind_gemm(step, c, stream, address, workspace))
            else:
                if self._cudnn is None:
                    self._cudnn = attention.Cudnn(self.graphs)
                names = ("qkv", "y", "lse", *(("dy", "dqkv") if step.direction == "backward" else ()))
                start = self._cudnn.bind(step, {n: address(n) for n in names}, workspace)
                starts.append(lambda first, start=start: start())
        return starts

    def _bind_kernel(self, k: Kernel, c: Call, stream: Any, address: Callable[[str], int], cubin: bytes) -> Start:
        args: list[Any] = []
        for word, boxes in pointers(k):
            at = address(word)
            args.append(tensor_map(at, *place(word, c)[0].shape, hopper.BOX) if boxes else ctypes.c_void_p(at))
        for word in k.args.partition("|")[2].split():
            value = number(word, c)
            args.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value))
        grid = (k.grid, 1, 1) if isinstance(k.grid, int) else k.grid
        function = self._module(cubin).function(k.entry, k.shared)
        start = launcher(stream, function, grid, k.block, k.shared, args)
        return lambda first: start()

    def _module(self, cubin: bytes) -> Module:
        if cubin not in self._modules:
            self._modules[cubin] = Module(cubin)
        return self._modules[cubin]

    def _bind_gemm(self, g: Gemm, c: Call, stream: Any, address: Callable[[str], int], workspace: int) -> Start:
        bias, aux = (address(word) if word else 0 for word in (g.bias, g.aux))
        addresses = address(g.a), address(g.b), address(g.out), bias, aux, workspace
        start = self._blas.bind(product(g, c, self.gpu), *addresses, stream)
        always = g.adds is True or (isinstance(g.adds, str) and g.adds not in c.first)
        sometimes = isinstance(g.adds, str)
        return lambda first: start(always or (sometimes and not first))


def _open_libraries() -> None:
    """Opens what takes long to open; who wants it finds it, or says what is missing."""
    with suppress(HandgradError):
        load("cublasLt", "nvidia-cublas")
        compiler()
    attention.library()


def _is_own(step: Kernel | Gemm | Sdpa) -> bool:
    """Whether a step is a product that our own kernel computes."""
    return isinstance(step, Gemm) and step.own


def source(k: Kernel | Gemm, c: Call, gpu: Gpu) -> Source:
    """What must be compiled for a launch."""
    if isinstance(k, Gemm):
        return hopper.source(k, c, gpu)
    args = (*zip(c.op.in_args, c.ins), *zip(c.op.out_args, c.outs))
    grads = {t.dtype for arg, t in args if arg.kind == "grad" and t is not None}
    types = {"HG_BF16": int(c.dtype is BF16), "HG_GRAD_BF16": int(BF16 in grads)}
    return Source(str(c.op.folder / k.file), gpu.arch, tuple(sorted((types | k.defines).items())))


def product(g: Gemm, c: Call, gpu: Gpu) -> Product:
    """What the choice of a product's algorithm depends on."""
    tensors = [place(word, c)[0] for word in (g.a, g.b, g.out)]
    a, b, out = ((c if t == "scratch" else t).dtype.name for t in tensors)  # scratch holds the working dtype
    return Product(g.m, g.n, g.k, g.ta, g.tb, a, b, out, g.epilogue, g.adds is not False, gpu.tf32)
