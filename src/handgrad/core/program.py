"""Program: the flat list of calls. Models append to it; the planner, backends, listings and tests read it."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handgrad.core.arguments import Arg
from handgrad.core.dtypes import BYTE, F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call, Op, Phase, When, bind_dims
from handgrad.core.params import ONE_GROUP, Bucket, Groups, Init, Param, Part, Vector, lay_out
from handgrad.core.ranks import ALONE, Ranks
from handgrad.core.scalars import STEP_SCALARS_BYTES
from handgrad.core.tensor import Role, Tensor

STATE = "state"  # prefix of state names in checkpoints; no flat vector has this name


@dataclass(frozen=True)
class Segment:
    """Consecutive calls [start, stop) of a list, which run together."""

    start: int
    stop: int


@dataclass(frozen=True)
class Segments:
    """The segments of a step: forward and backward once per micro-batch, then the norm, then the update."""

    forward_backward: Segment
    norm: Segment
    update: Segment

    @property
    def norm_update(self) -> Segment:
        """Norm and update as one segment, for steps in which the host does not decide between them."""
        return Segment(self.norm.start, self.update.stop)


@dataclass
class Program:
    """A list of calls under one working dtype."""

    dtype: DType = F32
    trains: bool = False  # backward will follow: dropout is active and pre-activations are kept
    accumulates: bool = True  # micro-batches accumulate gradients, so gradients do not share memory with activations
    grad_dtype: DType = F32  # of parameter gradients
    # bf16 weights keep the low 16 bits of their float32 in "low"; else updates round stochastically
    master: bool = True
    trainable: Callable[[str], bool] = lambda name: True  # whether the parameter of this name learns
    adapters: Mapping[str, Any] = field(default_factory=dict)  # by weight: what a model records beside it
    calls: list[Call] = field(default_factory=list)
    params: dict[str, Param] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, tuple[Tensor, Callable[[], Any]]] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # the host reads them after a run: live to the end
    # in backward: activations to their gradients so far
    pending_grads: dict[Tensor, Tensor] = field(default_factory=dict)
    recomputes: dict[Tensor, Tensor] = field(default_factory=dict)  # in backward: to the activations of the forward
    starts: dict[Tensor, int] = field(default_factory=dict)  # first element of a slice in its flat vector
    phase: Phase = Phase.FORWARD  # of the calls that are recorded now
    when: When = When.ALWAYS  # of calls recorded from now on
    ranks: Ranks = ALONE
    inside: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)  # a part of an activation: it, first element

    def __post_init__(self) -> None:
        self.scalars = Tensor("scalars", (STEP_SCALARS_BYTES,), BYTE, Role.SCALARS)
        self.producer: dict[Tensor, Call] = {}
        self._scope: list[str] = []
        self._block = ""
        self._where = ""
        self._streams = 0
        self._written: set[Tensor] = set()
        self._frozen: set[Tensor] = set()  # activations that depend on no parameter that learns
        self._groups = ONE_GROUP
        self._buckets: tuple[Bucket, ...] | None = None
        self._vectors: dict[str, Vector] = {}
        self._param_of: dict[Tensor, Tensor] = {}
        self._names: dict[str, int] = {}

    @property
    def segments(self) -> Segments:
        """The list's segments. A program without an update has its calls in the first one."""
        phases = [c.phase for c in self.calls]
        norm, update = (phases.index(p) if p in phases else len(phases) for p in (Phase.NORM, Phase.UPDATE))
        return Segments(Segment(0, norm), Segment(norm, update), Segment(update, len(phases)))

    def part(self, segment: Segment | None) -> list[Call]:
        """The calls of a segment, or all."""
        return self.calls if segment is None else self.calls[segment.start : segment.stop]

    # recording ----------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """A tensor that the host writes before each run."""
        return self.inputs.setdefault(name, Tensor(name, shape, dtype, Role.INPUT))

    def constant(self, name: str, shape: tuple[int, ...], dtype: DType, values: Callable[[], Any]) -> Tensor:
        """A tensor that never changes (a table of angles): `values()` is written once, when an arena is allocated.
        The same name twice is one tensor, so the name says what the values are."""
        return self.constants.setdefault(name, (Tensor(name, shape, dtype, Role.INPUT), values))[0]

    def state(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """A tensor outside the flat vectors that keeps its value from run to run (the KV cache)."""
        name = ".".join([*self._scope, name])
        return self.states.setdefault(name, Tensor(name, shape, dtype, Role.STATE))

    def param(self, name: str, shape: tuple[int, ...], init: Init, parts: tuple[Part, ...] = ()) -> Tensor:
        """Declares or finds the parameter `name` of the current scope; using the same name twice ties the weights.

        parts: the hidden matrices that its rows stack (params.py)
        """
        name = ".".join([*self._scope, name])
        known = self.params.get(name)
        if known is None:
            if self._buckets is not None:
                rule = "parameters are declared before the update is recorded"
                raise HandgradError("program", rule, f"'{name}' after it")
            if parts and sum(rows for rows, _ in parts) != shape[0]:
                raise HandgradError("program", f"the parts of '{name}' have its {shape[0]} rows", parts)
            handle = Tensor(name, shape, self.dtype, Role.PARAM, "param")
            known = Param(handle, init, self._block, self.trainable(name), parts)
            self.params[name] = known
        if known.tensor.shape != shape:
            raise HandgradError("program", f"parameter '{name}' has one shape", f"{known.tensor.shape} and {shape}")
        return known.tensor

    def output(self, name: str, tensor: Tensor) -> Tensor:
        """Marks a tensor that the host reads after a run. Returns it."""
        self.outputs[name] = tensor
        return tensor

    def grad(self, param: Tensor) -> Tensor:
        """The gradient of a parameter, in grad_dtype: one per parameter, however often the parameter is used."""
        if param.name not in self.grads:
            grad = Tensor("d " + param.name, param.shape, self.grad_dtype, Role.GRAD, "grad")
            self.grads[param.name], self._param_of[grad] = grad, param
        return self.grads[param.name]

    def wants(self, tensor: Tensor | None) -> bool:
        """Whether backward computes the gradient of this parameter or activation: a parameter learns, or an activation
        depends on one that does."""
        if tensor is None or tensor.role is Role.ACT:
            return tensor is not None and tensor not in self._frozen
        info = self.params.get(tensor.name) if tensor.role is Role.PARAM else None  # none of a slice of many
        return info is not None and info.trainable

    def wanted_grad(self, param: Tensor | None) -> Tensor | None:
        """`grad` of a parameter that learns; None for one that is frozen or absent."""
        return self.grad(param) if param is not None and self.wants(param) else None

    def next_stream(self) -> int:
        """The number of the next random call, the same for every recompute policy and plan."""
        self._streams += 1
        return self._streams

    def is_written(self, grad: Tensor) -> bool:
        """Whether a call recorded so far writes this parameter gradient."""
        return grad in self._written

    def take(self, tensor: Tensor) -> Tensor | None:
        """Removes and returns the gradient collected so far for an activation."""
        return self.pending_grads.pop(self.recomputes.get(tensor, tensor), None)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of parameters and states."""
        self._scope.append(name)
        yield
        self._scope.pop()

    @contextmanager
    def block(self, name: str, *, prefix: bool = True) -> Iterator[None]:
        """A named group of calls: the unit of recomputation, communication and profiling. Blocks do not nest."""
        outer, self._block = self._block, name
        if prefix:
            self._scope.append(name)
        yield
        if prefix:
            self._scope.pop()
        self._block = outer

    @contextmanager
    def at(self, call: Call, phase: Phase) -> Iterator[None]:
        """Records calls on behalf of another one: with its block and source line, in the given phase."""
        outer = self.phase, self._block, self._where, self.when
        self.phase, self._block, self._where, self.when = phase, call.block, call.where, call.when
        yield
        self.phase, self._block, self._where, self.when = outer

    def emit(
        self,
        op: Op,
        *ins: Tensor | None,
        into: dict[str, Tensor | None] | None = None,
        without: Collection[str] = (),
        **attrs: Any,
    ) -> Any:
        """Appends a call. Returns its output, or a tuple of its outputs, without inout outputs (`into`).

        An output that is not inout may go into a state, which the call then writes anew.
        without: names of optional outputs that nobody reads; they are None
        """
        outs = self.emit_call(op, ins, attrs, into, without)
        made = tuple(t for arg, t in zip(op.out_args, outs) if not arg.inout)
        return made[0] if len(made) == 1 else made

    def emit_call(
        self,
        op: Op,
        ins: tuple[Tensor | None, ...],
        attrs: dict[str, Any],
        into: dict[str, Tensor | None] | None = None,
        without: Collection[str] = (),
    ) -> tuple[Tensor | None, ...]:
        """`emit` with all outputs returned, in declared order."""
        where = self._where or caller()
        if set(attrs) != set(op.attrs):
            raise HandgradError(
                op.name, f"takes attributes {sorted(op.attrs)}", sorted(attrs), context=f"recorded at {where}"
            )
        attrs = {name: op.attrs[name](value) for name, value in attrs.items()}  # C reads a float where one is declared
        sizes = bind_dims(op, ins, attrs, where)
        outs: list[Tensor | None] = []
        first = set()
        for arg in op.out_args:
            if arg.inout or arg.name in (into or {}):
                target = (into or {}).get(arg.name)
                self._check_inout(op, arg, target, sizes, where)
                outs.append(target)
                if target is not None and target.role in (Role.GRAD, Role.SCALARS) and target not in self._written:
                    if self.when is When.LAST:
                        rule = f"the first writer of '{target.name}' runs in the first micro-batch"
                        raise HandgradError(op.name, rule, "a call for the last one", context=f"recorded at {where}")
                    self._written.add(target)
                    first.add(arg.name)
            elif arg.optional and (
                arg.name in without or not (sizes.keys() >= arg.letters and op.makes(arg.name, attrs, self.dtype))
            ):
                outs.append(None)
            else:
                shape = tuple(sizes[d] if d in sizes else int(d) for d in arg.dims)
                outs.append(Tensor(self._fresh(f"{op.name}.{arg.name}"), shape, arg.dtype(self.dtype), Role.ACT))
        call = Call(
            op,
            tuple(outs),
            tuple(ins),
            dict(attrs),
            self.phase,
            self._block,
            where,
            sizes,
            self.dtype,
            frozenset(first),
            self.when,
        )
        self.calls.append(call)
        is_frozen = not any(map(self.wants, ins))
        for t in outs:
            if t is not None and t.role is Role.ACT:
                self.producer[t] = call
                if is_frozen:
                    self._frozen.add(t)
        return call.outs

    def _check_inout(self, op: Op, arg: Arg, target: Tensor | None, sizes: dict[str, int], where: str) -> None:
        """Raises unless a given output has the shape and dtype that its kernel writes, or is optional and absent."""
        if target is None:
            if not arg.optional:
                raise HandgradError(op.name, f"output '{arg.name}' is missing", context=f"recorded at {where}")
            return
        found = (target.size,) if len(arg.dims) == 1 else target.shape  # one letter stands for any shape, flattened
        shape = tuple(int(d) if d.isdigit() else sizes.setdefault(d, n) for d, n in zip(arg.dims, found))
        dtype = arg.dtype(self.dtype, self.grad_dtype)
        if not arg.inout and target.role is not Role.STATE:
            rule = f"'{arg.name}' is a new activation, or goes into a state"
            raise HandgradError(op.name, rule, f"'{target.name}'", context=f"recorded at {where}")
        if shape != found or len(arg.dims) != len(found) or dtype is not target.dtype:
            raise HandgradError(
                op.name,
                f"'{arg.name}' is {shape} {dtype}",
                f"'{target.name}' {target.shape} {target.dtype}",
                context=f"recorded at {where}",
            )

    def _fresh(self, stem: str) -> str:
        stem = f"{self._block}/{stem}" if self._block else stem
        count = self._names[stem] = self._names.get(stem, 0) + 1
        return stem if count == 1 else f"{stem}#{count}"

    # the flat vectors -----------------------------------------------------------------------------------------------

    def group_by(self, groups: Groups) -> None:
        """Sets the optimizer's groups. Raises HandgradError if the flat order has been read already."""
        if self._buckets is not None:
            raise HandgradError("program", "groups are set before the flat order is read", groups.names)
        self._groups = groups

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The flat order of all parameters. The first read fixes it."""
        if self._buckets is None:
            self._buckets = lay_out(tuple(self.params.values()), self._groups, self.ranks.world)
        return self._buckets

    @property
    def trained(self) -> tuple[Bucket, ...]:
        """The buckets of parameters that learn."""
        return tuple(bucket for bucket in self.buckets if bucket.trainable)

    @property
    def vectors(self) -> dict[str, Vector]:
        """The flat vectors: "param" over all buckets; if there are gradients, "grad" over those that learn; and
        optimizer state."""
        if self.params and "param" not in self._vectors:
            self._vectors["param"] = self._vector("param", self.dtype, Role.PARAM, 3)
        if self.grads and "grad" not in self._vectors:
            self._vectors["grad"] = self._vector("grad", self.grad_dtype, Role.GRAD, 2)
        return self._vectors

    def flat(
        self,
        name: str,
        dtype: DType,
        buckets: Sequence[Bucket] | None = None,
        *,
        block: int = 1,
    ) -> Vector:
        """Declares optimizer state: a flat vector over these buckets, by default all that learn. It starts as zeros;
        checkpoints save it. block: elements of a parameter that share one of it, a divisor of FLAT_ALIGN."""
        if name in self.vectors or name == STATE:
            raise HandgradError("program", "names of flat vectors are unique", f"'{name}' twice")
        vector = self._vector(name, dtype, Role.STATE, 1, buckets, block)
        self._vectors[name] = vector
        return vector

    def _vector(
        self,
        name: str,
        dtype: DType,
        role: Role,
        stage: int,
        buckets: Sequence[Bucket] | None = None,
        block: int = 1,
    ) -> Vector:
        """A vector that is sharded from this ZeRO stage on."""
        if buckets is None:
            buckets = self.buckets if role is Role.PARAM else self.trained
        return Vector(name, dtype, role, buckets, self.ranks.zero >= stage, self.ranks, block)

    def slice(self, vector: str, bucket: Bucket) -> Tensor:
        """A handle on the part of a bucket that this rank updates, in a flat vector: its share, or all of it."""
        v, shares = self.vectors[vector], self.ranks.shares(1)
        size = bucket.size // shares // v.block
        start = v.bucket_start(bucket) + (self.ranks.rank * size if v.shares < shares else 0)
        return self._part(f"{bucket.name}.{vector}", v, start, size)

    def within(self, part: Tensor, first: int, size: int) -> Tensor:
        """A handle on elements [first, first + size) of a slice of a flat vector, or of an activation."""
        name = f"{part.name}@{first}"
        if not part.flat:
            return self.part_of(part, first, name, (size,), part.role)
        return self._part(name, self.vectors[part.flat], self.starts[part] + first, size)

    def share_start(self, bucket: Bucket) -> int:
        """The element of the flat order of all parameters at which that part starts."""
        shares = self.ranks.shares(1)
        return bucket.start + (self.ranks.rank * bucket.size // shares if shares > 1 else 0)

    def bucket(self, vector: str, bucket: Bucket) -> Tensor:
        """A handle on a whole bucket in a flat vector that is not sharded."""
        v = self.vectors[vector]
        return self._part(f"{bucket.name}.{vector}s", v, v.bucket_start(bucket), bucket.size)

    def part_of(self, base: Tensor, start: int, name: str, shape: tuple[int, ...], role: Role) -> Tensor:
        """A handle on a part of an activation, from element `start` on. A gradient in it has the role of one."""
        part = Tensor(name, shape, base.dtype, role)
        self.inside[part] = base, start
        return part

    def mark_written(self, grad: Tensor) -> None:
        """Says of a slice that calls recorded so far write it."""
        self._written.add(grad)

    def whole(self, vector: str) -> Tensor:
        """A handle on a whole flat vector."""
        v = self.vectors[vector]
        return self._part(f"{vector}s", v, 0, v.size)

    def element(self, t: Tensor) -> int:
        """The first element of a parameter, a gradient or a slice in its flat vector."""
        return self.starts[t] if t in self.starts else self.vectors[t.flat].start(self._param_of.get(t, t))

    def _part(self, name: str, vector: Vector, start: int, size: int) -> Tensor:
        handle = Tensor(name, (size,), vector.dtype, vector.role, vector.name)
        self.starts[handle] = start
        return handle

    @property
    def flat_size(self) -> int:
        """Elements of a flat vector over all buckets, padding included."""
        return sum(bucket.size for bucket in self.buckets)

    @property
    def num_params(self) -> int:
        """Number of parameters, those of padded rows included, without the alignment of vectors."""
        return sum(p.tensor.size for p in self.params.values())

    @property
    def num_trainable(self) -> int:
        """Number of parameters that learn, without padded rows."""
        return sum(p.size for p in self.params.values() if p.trainable)

    @property
    def num_padding(self) -> int:
        """Number of parameters in padded rows: they stay 0."""
        return self.num_params - sum(p.size for p in self.params.values())


_INSIDE = (
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent / "ops"),
    str(Path(__file__).parent.parent / "models" / "blocks.py"),
    str(Path(__file__).parent.parent / "optim"),
)


def caller() -> str:
    """`file:line` of the nearest frame outside the recorder, the ops and the shared model pieces."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_INSIDE) or "contextlib" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
