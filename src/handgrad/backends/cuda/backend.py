"""cuda: binds every call to the launches that its op declares, and replays each segment as one CUDA graph."""

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from handgrad.backends.base import Arena, Backend, Executable
from handgrad.backends.cuda import cudnn as attention
from handgrad.backends.cuda.alternatives import AddressOf, Alternatives
from handgrad.backends.cuda.arena import CudaArena
from handgrad.backends.cuda.cublaslt import CublasLt, GemmProblem
from handgrad.backends.cuda.driver import Device, Mark, Module, count, launcher, tensor_map
from handgrad.backends.cuda.gemm_autotune import tune_gemms
from handgrad.backends.cuda.graph import Graph, Graphs
from handgrad.backends.cuda.libraries import load
from handgrad.backends.cuda.nccl import Nccl
from handgrad.backends.cuda.nvrtc import Source, compile_all, compiler
from handgrad.backends.cuda.peaks import peaks
from handgrad.backends.cuda.planner import GpuPlanner, describe
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.core.arguments import kernel_words
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY, Call, MicroBatch, Op, When, resolve_number, resolve_pointer
from handgrad.core.plan import Plan, aligned
from handgrad.core.program import Program, Segment
from handgrad.core.streams import joins
from handgrad.core.tensor import Tensor
from handgrad.launch import Collective, Gemm, Gpu, Kernel, Launches, pointer_word, tensor_map_shape, type_defines

Launch = Callable[[], None]  # starts one launch
AHEAD = 4  # max graph launches in flight; beyond a few thousand queued kernels the driver busy-waits


class CudaExecutable(Executable):
    """The bound list. Each segment runs eagerly once, is captured on its second run, and is replayed as one CUDA graph
    afterwards. The first micro-batch of a step has a graph of its own."""

    def __init__(self, program: Program, arena: CudaArena, backend: "CudaBackend"):
        self.program, self.arena, self.device, self._capture = program, arena, backend.device, backend.graphs.capture
        self._joins = joins(program)
        self._backend = backend
        self._chosen = [(c, backend.launches(c)) for c in program.calls]
        self._compiled = compile_all([s for c, launches in self._chosen for s in backend.sources(c, launches)])
        self._starts = {ONLY: [self._bind(i, ONLY) for i in range(len(self._chosen))]}
        self._fork = self.device.event()
        has_ranks = any(c.op.communicates for c in program.calls)
        self._clock = backend.clock(arena.address + arena.plan.offset[program.scalars]) if has_ranks else None
        self._done = {i: self.device.event() for i in range(len(self._chosen)) if self._is_beside(i)}
        self._graphs: dict[tuple[Segment, MicroBatch], Graph | None] = {}
        self._replays = deque(self.device.event(blocking=True) for _ in range(AHEAD))

    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        key = segment or Segment(0, len(self.program.calls)), self._kind(micro_batch)
        if key not in self._graphs:
            with self.device.waiting():
                self._launch(*key)
            self._graphs[key] = None
            return
        with self.device.waiting():
            graph = self._graphs[key] or self._capture(lambda: self._launch(*key))
        self._graphs[key] = graph
        self.device.wait(self._replays[0])
        graph.replay()
        self.device.record(self._replays[0])
        self._replays.rotate(-1)

    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        segment, kind = segment or Segment(0, len(self.program.calls)), self._kind(micro_batch)
        begin, end = self.device.event(True), self.device.event(True)
        for i in range(segment.start, segment.stop):
            if kind.runs(self.program.calls[i].when):
                self.device.record(begin)
                self._launch(Segment(i, i + 1), kind)
                self.device.record(end)
                after(self.program.calls[i], self.device.seconds(begin, end))

    def _kind(self, micro_batch: MicroBatch) -> MicroBatch:
        """Graph key: `last` counts only if some call runs in the last micro-batch only."""
        has_last = any(c.when is When.LAST for c in self.program.calls)
        return MicroBatch(micro_batch.first, micro_batch.last if has_last else True)

    def _starts_of(self, kind: MicroBatch) -> list[list[Launch]]:
        if kind not in self._starts:  # only first writers of gradients differ
            same = self._starts[ONLY]
            self._starts[kind] = [self._bind(i, kind) if c.first else same[i] for i, c in enumerate(self.program.calls)]
        return self._starts[kind]

    def _bind(self, i: int, micro_batch: MicroBatch) -> list[Launch]:
        stream, compiled = self._stream(i), self._compiled
        return self._backend.bind_call(*self._chosen[i], self.program, self.arena, compiled, stream, micro_batch)

    def _overlaps(self, i: int) -> bool:
        return self._joins[i] > i + 1

    def _is_beside(self, i: int) -> bool:
        """Whether a call has another stream than the main one. Collectives share one: they must not change order."""
        return self._overlaps(i) or self.program.calls[i].op.communicates

    def _stream(self, i: int) -> Any:
        if self.program.calls[i].op.communicates:
            return self.device.exchange
        return self.device.side if self._overlaps(i) else self.device.stream

    def _launch(self, segment: Segment, kind: MicroBatch) -> None:
        """Starts the calls of a segment. Those that overlap others run on another stream, from a fork to a join."""
        device, starts = self.device, self._starts_of(kind)
        waiting: dict[int, list[int]] = {}  # by the call that waits: the overlapping calls
        for i in range(segment.start, segment.stop):
            self._wait(waiting.pop(i, []))
            if not kind.runs(self.program.calls[i].when):
                continue
            stream = self._stream(i)
            if self._is_beside(i):
                device.record(self._fork)
                device.follow(self._fork, stream)
            for start in starts[i]:
                start()
            if self._is_beside(i):
                device.record(self._done[i], stream)
                waiting.setdefault(self._joins[i], []).append(i)
        self._wait([i for calls in waiting.values() for i in calls])

    def _wait(self, calls: list[int]) -> None:
        """Has the main stream wait for overlapping calls; the time that it waits for collectives is counted."""
        own = [i for i in calls if not self.program.calls[i].op.communicates]
        for i in own:
            self.device.follow(self._done[i], self.device.stream)
        if len(own) < len(calls) and self._clock is not None:
            self._clock[0]()
            for i in calls:
                self.device.follow(self._done[i], self.device.stream)
            self._clock[1]()


class CudaBackend(Backend):
    """One GPU, that of this rank.

    tf32: float32 matmuls run on tensor cores, with operands rounded to TF32
    deterministic: runs are bit-identical for every recompute policy; no autotuning
    cudnn: use cuDNN's attention if it is installed
    comm: the ranks that train together, each on a GPU of its own
    """

    name = GpuPlanner.name
    head_rows = GpuPlanner.head_rows
    is_concurrent = GpuPlanner.is_concurrent
    dtypes = ("f32", "tf32", "bf16")
    grad_dtypes = ("f32", "bf16")
    is_asynchronous = True
    truncated_terms = 16  # k of one mma instruction

    def __init__(self, tf32: bool = False, deterministic: bool = False, cudnn: bool = True, comm: Comm = Alone()):
        self.comm = comm
        with ThreadPoolExecutor(1) as pool:  # while the driver creates its context
            pool.submit(_open_libraries)
            self.device = Device(comm.local_rank if count() > 1 else 0)  # a launcher may show each rank its own
        self.pci_bus, self.tf32, self.deterministic = self.device.pci_bus, tf32, deterministic
        self.graphs = Graphs(self.device)
        self._blas = CublasLt(self.graphs, deterministic)
        self._cudnn: attention.Cudnn | None = None  # opened when the first call needs it
        self._modules: dict[bytes, Module] = {}
        self._nccl = Nccl(self.device, comm, deterministic) if comm.world > 1 else None
        d = self.device
        self.gpu = describe(
            d.arch,
            d.sms,
            d.shared_bytes,
            d.l2_bytes,
            has_library_attention=cudnn and attention.library() is not None,
            tf32=tf32,
            deterministic=deterministic,
        )
        self._planner = GpuPlanner(self.gpu)
        self._alternatives = Alternatives(self.graphs, self._planner, self._blas.version)
        self.hardware = f"{d.name}, driver for CUDA {d.version // 1000}.{d.version % 1000 // 10}"

    def has(self, op: Op) -> bool:
        return self._planner.has(op)

    def scratch(self, call: Call) -> int:
        return self._planner.scratch(call)

    def note(self, call: Call) -> str:
        return self.launches(call).note

    def mark(self) -> Mark:
        mark = Mark()
        self.device.record(mark.event)
        return mark

    def seconds(self, begin: Mark, end: Mark) -> float:
        return self.device.seconds(begin.event, end.event)

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s in this dtype ("bf16", "tf32", "f32"): from the data sheet, or measured for unknown devices."""
        known = peaks(self.device.name)
        if known is not None:
            return getattr(known, dtype) * 1e12
        return self._blas.peak("bf16" if dtype == "bf16" else "f32", dtype == "tf32")

    def peak_bandwidth(self) -> float | None:
        """Bytes/s of device memory by the GPU's data sheet; None for unknown devices."""
        known = peaks(self.device.name)
        return None if known is None else 1e9 * known.gbps

    def alloc(self, plan: Plan) -> CudaArena:
        calls = [c for program in plan.programs for c in program.calls]
        leads = self.comm.rank == 0
        if not leads:  # rank 0 compiles and decides for all: they agree to the bit, and start once
            self._take(self.comm.all_gather_object(None)[0])
        self._prepare(calls)
        if leads and self.comm.world > 1:
            self.comm.all_gather_object(self._choices())
        return CudaArena(self.device, plan)

    def _choices(self) -> list[Any]:
        """What autotuning has chosen, as text."""
        return [self._blas.choices(), self._alternatives.choices()]

    def _take(self, choices: list[Any]) -> None:
        """Adopts the choices of another rank, which has the same GPU and libraries."""
        self._blas.take(choices[0])
        self._alternatives.take(choices[1])

    def _prepare(self, calls: list[Call]) -> None:
        """Compiles all kernels that the calls may need, and tunes what is not tuned yet."""
        untimed = self._alternatives.untimed(calls)
        needed = [(c, self.launches(c)) for c in calls]
        needed += [(c, launches) for c in untimed.values() for launches in self._all(c)]
        with ThreadPoolExecutor(1) as pool:  # compilers run in other processes; GEMM autotuning has the GPU to itself
            compiling = pool.submit(compile_all, [s for c, launches in needed for s in self.sources(c, launches)])
            tune_gemms(self._blas, [p for c in calls for p in self._gemm_problems(c)])  # before the arena takes memory
        compiled = compiling.result()
        bind = partial(self._bind, compiled=compiled, stream=self.device.stream)
        self._alternatives.tune(untimed, bind, self.scratch)

    def bind(self, program: Program, arena: Arena) -> CudaExecutable:
        assert isinstance(arena, CudaArena)
        for c in program.calls:
            if not self.has(c.op):
                rule = f"op '{c.op.name}' has no cuda kernel"
                raise HandgradError("bind", rule, context=f"called at {c.where}", hint="handgrad ops lists them")
        return CudaExecutable(program, arena, self)

    # one call -------------------------------------------------------------------------------------------------------

    def launches(self, c: Call) -> Launches:
        """The launches that are bound for a call."""
        return self._alternatives.chosen(c)

    def _all(self, c: Call) -> tuple[Launches, ...]:
        return self._planner.launches(c).alternatives()

    def sources(self, c: Call, launches: Launches) -> list[Source]:
        """The compilations that a call's launches need."""
        return [source(s, c, self.gpu) for s in launches.steps if isinstance(s, Kernel)]

    def _gemm_problems(self, c: Call) -> list[GemmProblem]:
        steps = [s for launches in self._all(c) for s in launches.steps if isinstance(s, Gemm)]
        return list(dict.fromkeys(gemm_problem(s, c, self.gpu) for s in steps))

    def bind_call(
        self,
        c: Call,
        launches: Launches,
        program: Program,
        arena: CudaArena,
        compiled: dict[Source, bytes],
        stream: Any,
        micro_batch: MicroBatch,
    ) -> list[Launch]:
        """Functions that start the launches of a call, one each."""
        plan = arena.plan

        def at(tensor: Tensor | str) -> int:
            if isinstance(tensor, Tensor):
                return arena.address + plan.offset[tensor]
            offset = plan.scratch.get(c, 0) if tensor == "scratch" else plan.offset[program.scalars]
            return arena.address + offset

        return self._bind(c, launches, at, compiled=compiled, stream=stream, micro_batch=micro_batch)

    def _bind(
        self,
        c: Call,
        launches: Launches,
        at: AddressOf,
        *,
        compiled: dict[Source, bytes],
        stream: Any,
        micro_batch: MicroBatch = ONLY,
    ) -> list[Launch]:
        def address(word: str) -> int:
            tensor, offset = resolve_pointer(pointer_word(word), c)
            return 0 if tensor is None else at(tensor) + offset

        workspace = at("scratch") + aligned(launches.scratch)
        starts: list[Launch] = []
        for step in launches.steps:
            if isinstance(step, Kernel):
                function = self._module(compiled[source(step, c, self.gpu)]).function(step.entry, step.shared)
                starts.append(bind_kernel(step, c, function, stream, address, micro_batch))
            elif isinstance(step, Gemm):
                starts.append(self._bind_gemm(step, c, stream, address, workspace, micro_batch))
            elif isinstance(step, Collective):
                assert self._nccl is not None, c  # the list of one rank has none
                where = address(step.send), address(step.receive)
                starts.append(partial(self._nccl.start, step.kind, *where, step.count, step.dtype, stream))
            else:
                if self._cudnn is None:
                    self._cudnn = attention.Cudnn(self.graphs)
                names = ("qkv", "y", "lse", *(("dy", "dqkv") if step.direction == "backward" else ()))
                starts.append(self._cudnn.bind(step, {n: address(n) for n in names}, workspace))
        return starts

    def clock(self, scalars: int) -> tuple[Launch, Launch]:
        """Functions that begin and end a wait for collectives; the step scalars at this address count its time."""
        source = Source(str(Path(__file__).with_name("wait.cu")), self.gpu.arch, (("HG_BF16", 0), ("HG_GRAD_BF16", 0)))
        module = self._module(compile_all([source])[source])
        begin, end = (module.function(f"wait_{name}_kernel", 0) for name in ("begin", "end"))
        start = partial(launcher, grid=(1, 1, 1), block=1, shared=0, args=[ctypes.c_void_p(scalars)])
        return start(self.device.stream, begin), start(self.device.stream, end)

    def _module(self, cubin: bytes) -> Module:
        if cubin not in self._modules:
            self._modules[cubin] = Module(cubin)
        return self._modules[cubin]

    def _bind_gemm(
        self, g: Gemm, c: Call, stream: Any, address: Callable[[str], int], workspace: int, micro_batch: MicroBatch
    ) -> Launch:
        bias, aux, addend = (address(word) if word else 0 for word in (g.bias, g.aux, g.addend))
        addresses = address(g.a), address(g.b), address(g.out), bias, aux, addend, workspace
        start = self._blas.bind(gemm_problem(g, c, self.gpu), *addresses, stream)
        return partial(start, bool(addend or resolve_number(g.accumulate, c, micro_batch)))


def bind_kernel(
    k: Kernel, c: Call, function: Any, stream: Any, address: Callable[[str], int], micro_batch: MicroBatch
) -> Launch:
    """A function that launches a kernel on these addresses."""
    args: list[Any] = []
    pointers, numbers = kernel_words(k.args)
    for word in pointers:
        shape = tensor_map_shape(word, c)
        args.append(tensor_map(address(word), *shape) if shape else ctypes.c_void_p(address(word)))
    for word in numbers:
        value = resolve_number(word, c, micro_batch)
        args.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value))
    grid = (k.grid, 1, 1) if isinstance(k.grid, int) else k.grid
    return launcher(stream, function, grid, k.block, k.shared, args)


def _open_libraries() -> None:
    """Opens the libraries that are slow to open. A missing one is reported later, where it is needed."""
    with suppress(HandgradError):
        load("cublasLt", "nvidia-cublas")
        compiler()
    attention.library()


def source(k: Kernel, c: Call, gpu: Gpu) -> Source:
    """The compilation that a launch needs."""
    defines = {**type_defines(c), **k.defines}
    return Source(str(c.op.folder / k.file), gpu.arch, tuple(sorted(defines.items())))


def gemm_problem(g: Gemm, c: Call, gpu: Gpu) -> GemmProblem:
    """All that the choice of a GEMM algorithm depends on."""

    def dtype(word: str) -> str:
        tensor, _ = resolve_pointer(word, c)
        return tensor.dtype.name if isinstance(tensor, Tensor) else c.dtype.name  # scratch holds the working dtype

    a, b, out = dtype(g.a), dtype(g.b), dtype(g.out)
    accumulates = g.accumulate != "0" or bool(g.addend)
    return GemmProblem(g.m, g.n, g.k, g.ta, g.tb, a, b, out, g.epilogue, accumulates, gpu.tf32, g.batch)
