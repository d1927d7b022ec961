"""Checks of ops and models: against the float64 oracle, against finite differences, by derived tolerances; and timing.

The tests and `handgrad ops` use it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from handgrad.backends.arena import HostMemory
from handgrad.backends.base import Arena, Backend
from handgrad.backends.ref import RefBackend
from handgrad.core.arguments import Arg
from handgrad.core.backward import Policy, backward, keep_all
from handgrad.core.dtypes import BF16, F32, DType
from handgrad.core.op import ONLY, Call, Case, MicroBatch, Op
from handgrad.core.params import ONES
from handgrad.core.plan import plan
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Role, Tensor

SENTINEL = 0xA5


@runtime_checkable
class Bytes(Protocol):
    """An arena whose bytes can be set and compared: every one but that of the exact oracle."""

    def fill(self, byte: int) -> None: ...

    def memory(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Error:
    """The worst element of one output. `ratio` is error / tolerance: above 1 is a failure."""

    out: str
    error: float
    tolerance: float
    nmse: float

    @property
    def ratio(self) -> float:
        return self.error / self.tolerance if self.error else 0.0


def tolerance(
    exact: np.ndarray, rounded: np.ndarray, dtype: DType, terms: int = 1, truncated: int = 0, moved: float = 0.0
) -> float:
    """The largest error that correct kernels make: twice that of the oracle computed in the working dtype, plus one ULP
    at the largest value, plus what the order of sums adds.

    A kernel may add the `terms` products of a float32 sum in another order than numpy. Independent roundings then
    differ by a random walk of sqrt(terms) units, which matters if outputs are float32. Tensor cores add `truncated`
    products at a time and truncate the sum towards zero: by one unit on average, terms / truncated times in the same
    direction, of sums that are half the last one on average; by twice that in the worst case.

    ULP and walk are relative to the output. An `ill_conditioned` op has intermediate sums s far larger than its output,
    which cancel or are exponentiated: rounding s once moves the output by |s| units times the derivative by s. Nearly
    all of the error is then in one row. So the oracle's error is a single sample, which depends on the order of sums in
    the machine's BLAS and may happen to be small. But a rounded sum is the exact sum of inputs with other last bits:
    twice `moved`, the largest change of the exact output between neighbouring inputs, replaces ULP and walk if it is
    larger.
    """
    top = float(np.max(np.abs(exact), initial=0.0))
    ulp = 2.0 ** (np.floor(np.log2(top)) if top > 0 else 0.0) * 2 * dtype.unit
    emulated = float(np.max(np.abs(rounded.astype(np.float64) - exact), initial=0.0))
    walk = max(np.sqrt(terms), terms / truncated if truncated else 0) * F32.unit * top
    return 2 * emulated + max(ulp + walk, 2 * moved)


def case_sizes(op: Op, case: Case) -> dict[str, int]:
    """The size of every letter of a case, and its integer attributes."""
    sizes = {k: v for k, v in case.sizes.items() if isinstance(v, int) and not isinstance(v, bool)}
    op.derive(sizes)
    return sizes


def case_program(op: Op, case: Case, dtype: DType, *, accumulate: bool = False) -> tuple[Program, Call]:
    """A program of one call, and that call. Its inputs are the program's; each inout output is a tensor of its own."""
    p, sizes = Program(dtype, trains=True), case_sizes(op, case)

    def shape(arg: Arg) -> tuple[int, ...]:
        return tuple(sizes[d] if d in sizes else int(d) for d in arg.dims)

    ins = tuple(None if a.name in case.without else p.input(a.name, shape(a), a.dtype(dtype)) for a in op.in_args)
    into: dict[str, Tensor | None] = {}
    for a in op.out_args:
        if a.inout and a.name == "scalars":
            into[a.name] = p.scalars
        elif a.inout and a.name not in case.without and (not a.optional or op.makes(a.name, case.sizes, dtype)):
            role = Role.GRAD if a.kind == "grad" else Role.STATE
            into[a.name] = p.states[a.name] = Tensor(a.name, shape(a), a.dtype(dtype), role)
    p.emit_call(op, ins, {k: case.sizes[k] for k in op.attrs}, into, case.without)
    if accumulate:
        p.calls[-1].first = frozenset()  # as if an earlier call had written the gradients
    return p, p.calls[-1]


def case_arrays(op: Op, c: Call, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for inputs and inout outputs, rounded to their dtypes.

    The first rows of matrices are hard cases: one of zeros, two equal ones, one with a large mean.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = dict(c.sizes) | c.attrs
    for args, tensors in ((op.in_args, c.ins), (op.out_args, c.outs)):
        for arg, t in zip(args, tensors):
            if t is None or (args is op.out_args and not arg.inout) or t.role is Role.SCALARS:
                continue
            value = op.sample(rng, arg, t.shape, arrays)
            if value is None:
                value = rng.standard_normal(t.shape)
                if len(t.shape) == 2 and t.shape[0] > 4 and args is op.in_args:
                    value[0], value[1] = 0.0, value[2]
                    value[3] += 8.0
            arrays[arg.name] = round_to(np.asarray(value), t.dtype)
    return {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}


def round_to(value: np.ndarray, dtype: DType) -> np.ndarray:
    """Values rounded to the dtype, as float64; integers unchanged."""
    if dtype.unit == 0.0:
        return value
    return value.astype(ml_dtypes.bfloat16 if dtype is BF16 else np.float32).astype(np.float64)


def neighbours(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Sets of float32 inputs that differ in the last bit. Each array as a whole is scaled up or down, because changes
    of single elements would average out; whole numbers stay.

    Any two arrays move in opposite directions in one of the sets, so that differences of their sums change: set i goes
    by bit i of the arrays' numbers.
    """
    floats = [k for k, x in arrays.items() if x.dtype.kind == "f"]
    sets = []
    for bit in range(max(2, (len(floats) - 1).bit_length())):
        sign = {k: -1 if n >> bit & 1 else 1 for n, k in enumerate(floats)}
        sets.append({k: round_to(x * (1 + sign[k] * F32.unit), F32) if k in sign else x for k, x in arrays.items()})
    return sets


def run_case(
    p: Program, c: Call, arrays: dict[str, np.ndarray], backend: Backend, micro_batch: MicroBatch = ONLY
) -> dict[str, np.ndarray]:
    """The outputs of one call on a backend, as float64. Also checks that the call wrote nothing else in the arena."""
    layout = backend.plan(p)
    arena = backend.alloc(layout)
    planned = arena if isinstance(arena, Bytes) else None
    if planned is not None:
        planned.fill(SENTINEL)
    for args, tensors in ((c.op.in_args, c.ins), (c.op.out_args, c.outs)):
        for arg, t in zip(args, tensors):
            if t is not None and arg.name in arrays:
                arena.write(t, arrays[arg.name])
    set_scalars(p, arena)
    before = None if planned is None else planned.memory()
    backend.bind(p, arena).run(micro_batch=micro_batch)
    outs = {
        name: np.array(arena.read(t), np.float64)
        for name, t in c.named_outs()
        if t.role is not Role.SCALARS and name not in c.op.undefined.split()
    }
    scalars = arena.fetch_scalars(p)()
    if any(t is p.scalars for t in c.outs):
        outs["scalars"] = np.array([scalars.loss_sum, scalars.grad_norm, scalars.grad_scale])
    if planned is not None and before is not None:
        after, spans = planned.memory(), [(layout.offset[t], t.nbytes) for t in c.outs if t is not None]
        if c in layout.scratch:
            spans.append((layout.scratch[c], backend.scratch(c)))
        for start, size in spans:
            after[start : start + size] = before[start : start + size]
        assert np.array_equal(after, before), f"{c.op.name} wrote outside its outputs"
    return outs


def set_scalars(p: Program, arena: Arena) -> None:
    """Writes the step scalars of every check: step 3, learning rate 1e-3, and so on."""
    inputs = {"seed": 7, "step": 3, "state_since": 1, "micro_step": 0, "position": 0, "momentum": 0.9}
    arena.write_scalars(p, **inputs, lr=1e-3, loss_sum=0.25, loss_scale=0.125, grad_norm=0.0, grad_scale=0.5)


def check_case(op: Op, case: Case, backend: Backend, dtype: DType, seed: int = 0) -> list[Error]:
    """Errors of every output of a case against the oracle.

    Small cases with inout outputs run three times: as the first writer of the gradients, as a second call of the list
    that adds to them, and in a later micro-batch. Real shapes run once, as the first writer.
    """
    errors = []
    modes = [(False, ONLY), (True, ONLY), (False, MicroBatch(first=False))]
    for accumulate, micro_batch in modes if any(a.inout for a in op.out_args) and not case.real else modes[:1]:
        p, c = case_program(op, case, dtype, accumulate=accumulate)
        arrays = case_arrays(op, c, seed)
        runs = [run_case(p, c, arrays, b, micro_batch) for b in (RefBackend(), RefBackend(exact=False), backend)]
        near = []
        if op.ill_conditioned:
            near = [run_case(p, c, a, RefBackend(), micro_batch) for a in neighbours(arrays)]
        terms = max([1, *c.sizes.values()])
        for arg in op.out_args:
            kind = F32 if arg.name == "scalars" else arg.dtype(dtype)
            if arg.name not in runs[0] or not kind.unit or not runs[0][arg.name].size:
                continue  # nothing, or an integer half of a weight: the op's own test joins and checks it
            exact, rounded, got = (r[arg.name] for r in runs)
            moved = 0.0  # not for bf16: it rounds every element, so the oracle's error is not a single sample
            if kind is F32:
                moved = max((float(np.max(np.abs(n[arg.name] - exact))) for n in near), default=0.0)
            truncated = backend.truncated_terms if dtype is BF16 else 0
            limit = tolerance(exact, rounded, kind, terms, truncated, moved)
            error = float(np.max(np.abs(got - exact), initial=0.0))
            if not np.isfinite(got).all():
                error = np.inf
            nmse = float(np.mean((got - exact) ** 2) / (np.mean(exact**2) + 1e-300))
            errors.append(Error(arg.name, error, limit, nmse))
    return errors


def check_op(op: Op, backends: list[Backend], dtypes: tuple[DType, ...] = (F32, BF16)) -> None:
    """Asserts every case of an op on every backend, and its gradient rule if it has one."""
    for case in op.cases:
        for backend in backends:
            for dtype in dtypes:
                for e in check_case(op, case, backend, dtype):
                    assert e.ratio <= 1, f"{op.name} {case.sizes} {backend.name} {dtype}: {e}"
        if not case.real and type(op).backward is not Op.backward:
            worst = gradcheck_op(op, case)
            assert worst < 1e-6, f"gradient rule of {op.name} {case.sizes}: relative error {worst:.1e}"


def gradcheck_op(op: Op, case: Case, samples: int = 6) -> float:
    """The largest relative error of an op's gradient rule against central differences of its oracle, in float64."""
    from handgrad.ops import add

    p, sizes = Program(F32, trains=True, trainable=lambda name: f"d{name}" not in case.without), case_sizes(op, case)
    ins: list[Tensor | None] = []
    into: dict[str, Tensor | None] = {}
    for a in op.in_args:
        if a.name in case.without:
            ins.append(None)
            continue
        shape = tuple(sizes[d] if d in sizes else int(d) for d in a.dims)
        if a.name in op.params.split():
            ins.append(p.param(a.name, shape, ONES))
        elif a.dtype(F32) is F32:
            ins.append(Tensor(a.name, shape, F32, Role.ACT))
        else:
            ins.append(p.input(a.name, shape, a.dtype(F32)))
    for a in op.out_args:
        if a.inout and a.name not in case.without:
            into[a.name] = p.grad(p.params[a.name[1:]].tensor)
    p.emit_call(op, tuple(ins), {k: case.sizes[k] for k in op.attrs}, into, case.without)
    c, forward = p.calls[-1], Segment(0, len(p.calls))
    results = [(name, t) for name, t in c.named_outs() if name in op.differentiated.split()]
    seeds = {} if op.starts_gradient else {t: p.input("seed " + name, t.shape, F32) for name, t in results}
    backward(p, add, seeds=seeds)
    backend = RefBackend()
    arena = backend.alloc(plan(p))
    set_scalars(p, arena)
    arrays = case_arrays(op, c)
    rng = np.random.default_rng(1)
    inputs = [t for t in ins if t is not None]
    for t in inputs:
        arena.view(t)[...] = arrays[t.name]
    for seed in seeds.values():
        arena.view(seed)[...] = rng.standard_normal(seed.shape)
    run = backend.bind(p, arena)
    run.run()
    gradients = {
        t: np.array(arena.view(p.grad(t) if t.role is Role.PARAM else p.pending_grads[t]))
        for t in inputs
        if (p.wanted_grad(t) if t.role is Role.PARAM else p.pending_grads.get(t)) is not None
    }

    def loss() -> float:
        run.run(forward)
        if op.starts_gradient:
            return float(arena.scalars(p).loss_scale * arena.view(c.losses).sum())
        return sum(float((arena.view(t) * arena.view(seeds[t])).sum()) for _, t in results)

    return max(difference_error(loss, arena.view(t), gradient, samples, rng) for t, gradient in gradients.items())


def difference_error(
    loss: Callable[[], float], x: np.ndarray, gradient: np.ndarray, samples: int, rng: Any, step: float = 1e-5
) -> float:
    """The largest |numeric - gradient| / (largest |gradient|) over a few random elements of x. Restores x."""
    worst, scale = 0.0, float(np.max(np.abs(gradient))) + 1e-12
    for _ in range(samples):
        at = tuple(rng.integers(0, n) for n in x.shape)
        old = x[at]
        x[at] = old + step
        high = loss()
        x[at] = old - step
        low = loss()
        x[at] = old
        worst = max(worst, abs((high - low) / (2 * step) - gradient[at]) / scale)
    return worst


def gradcheck(
    record: Callable[[Program], None],
    fill: Callable[[Program, HostMemory], None],
    drop: Policy = keep_all,
    samples: int = 3,
) -> float:
    """The largest relative gradient error of a model in float64. `record` appends the forward, `fill` writes inputs."""
    from handgrad.ops import add

    p = Program(F32, trains=True)
    record(p)
    forward = Segment(0, len(p.calls))
    backward(p, add, drop=drop)
    backend = RefBackend()
    arena = backend.alloc(plan(p))
    fill(p, arena)
    run = backend.bind(p, arena)
    run.run()
    gradients = {name: np.array(arena.view(p.grad(info.tensor))) for name, info in p.params.items() if info.trainable}
    rng = np.random.default_rng(2)

    def loss() -> float:
        run.run(forward)
        losses = [t for name, t in p.outputs.items() if name.endswith("losses")]  # a model may have several
        return float(arena.scalars(p).loss_scale * sum(arena.view(t).sum() for t in losses))

    return max(
        difference_error(loss, arena.view(p.params[name].tensor), g, samples, rng) for name, g in gradients.items()
    )


@dataclass(frozen=True)
class Timing:
    """One case on one backend: median seconds, and the GB/s (1e9) and GFLOP/s of that time."""

    seconds: float
    gbps: float
    gflops: float


def bench_case(op: Op, case: Case, backend: Backend, dtype: DType, seconds: float = 0.3) -> Timing:
    """Times a case: the median of as many runs as fit in `seconds`, at least five, after a warm-up run."""
    p, c = case_program(op, case, dtype)
    arena = backend.alloc(backend.plan(p))
    for arg, t in zip(op.in_args, c.ins):
        if t is not None:
            arena.write(t, case_arrays(op, c)[arg.name])
    set_scalars(p, arena)
    run = backend.bind(p, arena)
    run.run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        run.run_each(lambda call, taken: times.append(taken))
    median = statistics.median(times)
    return Timing(median, op.nbytes(c) / median / 1e9, op.flops(c) / median / 1e9)
