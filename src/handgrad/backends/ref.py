"""ref: executes programs in numpy. The oracle of every op and of whole models.

exact    every tensor is a float64 array of its own, without a planned arena
rounded  every tensor is in the planned arena in its declared dtype and is rounded when written; ops compute in
         float32. `poison` sets outputs to NaN before inputs are read, like a kernel that writes first, so that a plan
         in which two live tensors overlap gives NaN.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from handgrad.backends.arena import NUMPY, STEP_SCALARS_DTYPE, HostArena, HostMemory
from handgrad.backends.base import Arena, Backend, Executable
from handgrad.backends.ranks.comm import Alone, Comm
from handgrad.core.op import ONLY, Call, MicroBatch, Op
from handgrad.core.plan import Plan
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Role, Tensor


class ExactArena(HostMemory):
    """float64 arrays by tensor, allocated at first use. Slices of a flat vector share its memory."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._arrays: dict[Tensor | str, np.ndarray] = {}
        self._flat: dict[str, np.ndarray] = {}
        self._scalars: dict[int, np.ndarray] = {}
        self.write_constants()

    def view(self, tensor: Tensor) -> np.ndarray:
        if tensor in self.plan.inside:
            base, start = self.plan.inside[tensor]
            return self.view(base).reshape(-1)[start : start + tensor.size].reshape(tensor.shape)
        if tensor.flat:
            start = self.plan.programs[0].element(tensor)
            return self.vector(tensor.flat)[start : start + tensor.size].reshape(tensor.shape)
        key = tensor.name if tensor.role is Role.STATE else tensor  # programs share a state by its name
        if key not in self._arrays:
            self._arrays[key] = np.zeros(tensor.shape, np.int32 if tensor.dtype.name == "i32" else np.float64)
        return self._arrays[key]

    def vector(self, name: str) -> np.ndarray:
        return self._flat.setdefault(name, np.zeros(self.plan.vectors[name].size))

    def scalars(self, program: Program) -> Any:
        return self._scalars.setdefault(id(program), np.zeros(1, STEP_SCALARS_DTYPE).view(np.recarray))[0]


class RefExecutable(Executable):
    """Runs each call's `ref` in list order."""

    def __init__(self, program: Program, arena: HostMemory, poison: bool, comm: Comm):
        self.program, self.arena, self.poison, self.comm = program, arena, poison, comm
        self.scalars = arena.scalars(program)

    def run(self, segment: Segment | None = None, micro_batch: MicroBatch = ONLY) -> None:
        self.run_each(lambda c, seconds: None, segment, micro_batch)

    def run_each(
        self, after: Callable[[Call, float], None], segment: Segment | None = None, micro_batch: MicroBatch = ONLY
    ) -> None:
        for c in self.program.part(segment):
            if micro_batch.runs(c.when):
                begin = time.perf_counter()
                self._call(c, micro_batch)
                after(c, time.perf_counter() - begin)

    def _call(self, c: Call, micro_batch: MicroBatch) -> None:
        if c.op.communicates:
            self.comm.run(c, self.arena.operands(c, self.program, micro_batch))
            return
        exact = isinstance(self.arena, ExactArena)
        kept = np.float64 if exact else NUMPY[c.dtype.name]
        v = SimpleNamespace(
            scalars=self.scalars,
            accumulates=lambda out: c.accumulates(out, micro_batch),
            round=lambda x: x.astype(kept).astype(x.dtype),
            **c.sizes,
            **{k: a for k, a in c.attrs.items() if k not in c.sizes},
        )
        outs = [None if t is None else self.arena.view(t) for t in c.outs]
        if self.poison:
            for arg, out in zip(c.op.out_args, outs):
                if out is not None and not arg.inout:
                    out.view(np.uint8)[...] = 0xFF  # NaN in f32 and bf16
        for args, views in (
            (c.op.in_args, [None if t is None else self.arena.view(t) for t in c.ins]),
            (c.op.out_args, outs),
        ):
            for arg, view in zip(args, views):
                if args is c.op.out_args and (not arg.inout or arg.name == "scalars"):
                    continue  # computed by this call; or set above
                if view is not None and view.dtype.kind != "i":
                    view = view.astype(np.float64 if exact else np.float32)
                setattr(v, arg.name, view)
        for arg, tensor, out, value in zip(c.op.out_args, c.outs, outs, c.op.ref(v)):
            if tensor is None or out is None or value is None:
                continue
            accumulates = tensor.role is Role.GRAD and c.accumulates(arg.name, micro_batch)
            out[...] = np.reshape(out + value if accumulates else value, out.shape)


class RefBackend(Backend):
    """exact: float64. Otherwise the planned arena in declared dtypes, optionally poisoned."""

    name = "ref"
    hardware = "numpy"
    head_rows = 512

    def __init__(self, exact: bool = True, poison: bool = False, comm: Comm = Alone()):
        self.comm = comm
        self.exact = exact
        self.poison = poison and not exact

    def has(self, op: Op) -> bool:
        return True

    def scratch(self, call: Call) -> int:
        return 0

    def alloc(self, plan: Plan) -> HostMemory:
        return ExactArena(plan) if self.exact else HostArena(plan)

    def bind(self, program: Program, arena: Arena) -> RefExecutable:
        assert isinstance(arena, HostMemory)
        return RefExecutable(program, arena, self.poison, self.comm)
