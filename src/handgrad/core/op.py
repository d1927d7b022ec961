"""Op: a hand-written kernel, declared with its shapes, gradient rule, implementations and cases. Call: one use of it.

arguments.py explains how arguments are declared.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Any, Protocol

from handgrad.core.arguments import ACCUMULATE, Arg, parse_args
from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.tensor import Role, Tensor


@dataclass(frozen=True)
class CpuKernel:
    """A CPU kernel: its entry point and its arguments, outputs first, as pointers | numbers (arguments.py).

    The number `threads` is the backend's number of threads. `scratch` names the C function that returns the bytes of
    scratch, followed by that function's arguments.
    """

    entry: str
    args: str
    scratch: str = ""


@dataclass(frozen=True)
class Case:
    """Sizes and attributes of a call, for checks against the oracle, gradient checks and timing.

    `real` names the model whose shape it is. Only such cases are timed; gradient checks skip them.
    """

    sizes: dict[str, Any]
    real: str = ""
    without: tuple[str, ...] = ()  # optional inputs and inout outputs that are absent


def case(real: str = "", without: str = "", **sizes: Any) -> Case:
    """A case from keyword arguments: `case(N=7, C=33, eps=1e-5, without="b")`."""
    return Case(sizes, real, tuple(without.split()))


class Phase(StrEnum):
    """The part of a step that a call belongs to."""

    FORWARD = auto()
    RECOMPUTE = auto()
    BACKWARD = auto()
    NORM = auto()
    UPDATE = auto()
    COMMUNICATE = auto()  # between ranks, within whichever segment it is recorded


class When(Enum):
    """The micro-batches of a step for which a call runs."""

    ALWAYS = "always"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True)
class MicroBatch:
    """The position of a micro-batch in its step: the first one writes gradients, later ones add to them."""

    first: bool = True
    last: bool = True

    def runs(self, when: When) -> bool:
        """Whether a call with this `when` runs in it."""
        return when is When.ALWAYS or (self.first if when is When.FIRST else self.last)


ONLY = MicroBatch()  # the micro-batch of a step that does not accumulate


class Recorder(Protocol):
    """The part of `Program` that gradient rules use."""

    producer: dict[Tensor, "Call"]  # the call that makes each activation

    def emit(
        self,
        op: "Op",
        *ins: Tensor | None,
        into: dict[str, Tensor | None] | None = None,
        without: Collection[str] = (),
        **attrs: Any,
    ) -> Any:
        """Appends a call and returns its outputs; without: optional ones that nobody reads."""

    def emit_call(self, op: "Op", ins: tuple[Tensor | None, ...], attrs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """`emit` with all outputs returned, in declared order."""

    def wants(self, tensor: Tensor | None) -> bool:
        """Whether backward computes the gradient of this parameter or activation."""

    def wanted_grad(self, param: Tensor | None) -> Tensor | None:
        """The gradient of a parameter that learns; None for one that is frozen or absent."""

    def take(self, tensor: Tensor) -> Tensor | None:
        """Removes and returns the gradient collected so far for an activation."""


class Op:
    """Base of every op. Subclasses are final and stateless; `handgrad.ops` has one instance of each."""

    name: str = ""
    ins: str = ""
    outs: str = ""
    attrs: dict[str, type] = {}
    params: str = ""  # names of the inputs that are parameters
    saved: str = ""  # names of inputs and outputs that the gradient rule reads
    differentiated: str = "y"  # names of the outputs that gradients flow into
    undefined: str = ""  # names of outputs that are only workspaces: their values after the call have no meaning
    kept: str = ""  # names of outputs that even the policy "block" keeps, because recomputing them is expensive
    starts_gradient: bool = False  # computes the gradient of its inputs itself, in the forward phase (lm_loss)
    communicates: bool = False  # ranks exchange values: `exchange` runs it where memory is the host's
    overlap: int = 0  # how many calls after it may run concurrently, unless they use what it writes
    ill_conditioned: bool = False  # large intermediates cancel or are exponentiated: one ulp of an input moves outputs
    cpu: CpuKernel | None = None
    cases: tuple[Case, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.in_args = parse_args(cls.ins)
        cls.out_args = parse_args(cls.outs)
        names = [arg.name for arg in (*cls.in_args, *cls.out_args)]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise HandgradError(cls.name, "argument names are unique and not attributes of Call", f"'{name}'")

    in_args: tuple[Arg, ...]
    out_args: tuple[Arg, ...]

    def derive(self, d: dict[str, int]) -> None:
        """Adds dimensions that follow from others, and checks sizes beyond what letters express."""

    def backward(self, g: Recorder, c: "Call", d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Appends gradient calls; returns the gradients of the activation inputs by input name.

        `d` holds the gradient of each output, None if nothing reads the output. A rule whose kernel can add to an
        existing gradient of input x takes it by `g.take(c.x)`. It runs if `g.wants` the gradient of some input, and
        computes none that is not wanted where a call or an output of its own would do so.
        """
        raise HandgradError(self.name, "this op has no gradient", hint="use it after backward or in inference")

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        """Whether an optional output exists under these attributes and working dtype. One with a letter that no input
        has does not."""
        return True

    def reads(self, g: Recorder, c: "Call") -> set[str]:
        """Which of `saved` the gradient rule reads for the gradients that are wanted."""
        return set(self.saved.split())

    def cheap(self, c: "Call") -> dict[str, str]:
        """Outputs that are cheap to recompute from what backward keeps anyway, with their kind, act or norm."""
        return {}

    def recompute(self, g: Recorder, c: "Call", want: set[str]) -> dict[str, Tensor]:
        """Emits calls that recompute the outputs `want`; by default the whole call."""
        outs = g.emit_call(self, c.ins, c.attrs)
        return {arg.name: out for arg, out in zip(self.out_args, outs) if out is not None}

    def flops(self, c: "Call") -> int:
        """FLOP of one call, a multiply-add counted as 2, for MFU and `handgrad ops bench`; 0 for memory-bound ops."""
        return 0

    def nbytes(self, c: "Call") -> int:
        """Bytes that one call must move: every argument once (inout outputs twice)."""
        total = sum(t.nbytes for t in c.ins if t is not None)
        for arg, out in zip(self.out_args, c.outs):
            total += 0 if out is None else out.nbytes * (2 if arg.inout and not c.begins(arg.name) else 1)
        return total

    def cuda(self, c: "Call", gpu: Any) -> Any:
        """The `Launches` of one call on a `Gpu` (handgrad.launch)."""
        raise NotImplementedError

    def ref(self, v: Any) -> tuple:
        """The oracle, in numpy: returns all outputs in order. `v` holds inputs, inout outputs, sizes and attributes.

        `v.round(x)` is x rounded to the working dtype, for values that the call stores and then reads again.
        """
        raise NotImplementedError

    def exchange(self, comm: Any, v: Any) -> None:
        """Runs a call of an op that communicates. `v` holds its inputs and outputs as arrays to read and write, sizes,
        attributes, the step scalars and `accumulates`; `comm` are the ranks (backends/ranks/comm.py)."""
        raise NotImplementedError

    def sample(self, rng: Any, arg: Arg, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        """A random array for an input of a case; None means the default, a standard normal."""
        return None

    @property
    def folder(self) -> Path:
        """The folder of the op's files."""
        return Path(str(sys.modules[type(self).__module__].__file__)).parent

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Call:
    """One entry of a program's list. Inputs and outputs are attributes by their declared names: `c.dw`."""

    op: Op
    outs: tuple[Tensor | None, ...]
    ins: tuple[Tensor | None, ...]
    attrs: dict[str, Any]
    phase: Phase
    block: str
    where: str  # file:line of the model code that recorded it
    sizes: dict[str, int]
    dtype: DType  # the program's working dtype
    first: frozenset[str] = frozenset()  # inout outputs that this call is the first to write in a step
    when: When = When.ALWAYS
    overwrites: frozenset[str] = frozenset()  # inout outputs that it writes anew in every micro-batch
    overlap: int | None = None  # overrides op.overlap; None: the op's

    def __getattr__(self, name: str) -> Any:  # a Tensor, or None if it is absent
        for args, tensors in ((type(self.op).in_args, self.ins), (type(self.op).out_args, self.outs)):
            for arg, tensor in zip(args, tensors):
                if arg.name == name:
                    return tensor
        raise AttributeError(f"{self.op.name} has no argument '{name}'")

    def named_outs(self) -> Iterator[tuple[str, Tensor]]:
        """The outputs that exist, with their declared names."""
        return ((arg.name, t) for arg, t in zip(self.op.out_args, self.outs) if t is not None)

    @property
    def flops(self) -> int:
        """`Op.flops` of this call."""
        return self.op.flops(self)

    def accumulates(self, out: str, micro_batch: MicroBatch) -> bool:
        """Whether inout output `out` already holds a value of this step, so that the call adds to it."""
        return not (out in self.overwrites or (micro_batch.first and out in self.first))

    def begins(self, out: str) -> bool:
        """Whether there is a micro-batch in which the call writes inout output `out` anew."""
        return out in self.overwrites or out in self.first


WORDS = {"scalars": "scalars", "scratch": "scratch", "null": None}  # pointer words that name no argument
RESERVED = {f.name for f in fields(Call)} | {name for name in vars(Call) if not name.startswith("_")}
RESERVED |= {"scratch", "null"}


def resolve_pointer(word: str, c: Call) -> tuple[Tensor | str | None, int]:
    """What a pointer word names (a tensor, "scalars", "scratch", or None for NULL), and an offset in bytes."""
    name, _, offset = word.partition("@")
    return (WORDS[name] if name in WORDS else getattr(c, name)), int(offset or 0)


def resolve_number(word: str, c: Call, micro_batch: MicroBatch = ONLY) -> int | float:
    """The value of a number word: a float if the attribute is one, else an int."""
    if word.isdigit():
        return int(word)
    if word.startswith(ACCUMULATE):
        return int(c.accumulates(word.removeprefix(ACCUMULATE), micro_batch))
    value = c.sizes[word] if word in c.sizes else c.attrs[word]
    return value if isinstance(value, float) else int(value)


def bind_dims(op: Op, ins: tuple[Tensor | None, ...], attrs: dict[str, Any], where: str) -> dict[str, int]:
    """The size of every letter of a call. Raises HandgradError, naming both tensors, if two disagree."""
    sizes: dict[str, int] = {}
    owner: dict[str, Tensor] = {}
    context = f"recorded at {where}"
    if len(ins) != len(op.in_args):
        raise HandgradError(op.name, f"takes {len(op.in_args)} inputs ({op.ins})", len(ins), context=context)
    for arg, t in zip(op.in_args, ins):
        if t is None:
            if not arg.optional:
                raise HandgradError(op.name, f"input '{arg.name}' is missing", context=context)
            continue
        if len(t.shape) != len(arg.dims):
            rule = f"{arg.name} has dimensions ({','.join(arg.dims)})"
            raise HandgradError(op.name, rule, f"'{t.name}' of shape {t.shape}", context=context)
        for letter, size in zip(arg.dims, t.shape):
            if sizes.setdefault(letter, size) != size:
                other = owner[letter]
                raise HandgradError(
                    op.name,
                    f"{letter} is {sizes[letter]} in '{other.name}' {other.shape}",
                    f"{size} in '{t.name}' {t.shape}",
                    context=context,
                    hint="a size in the model's configuration and a tensor disagree",
                )
            owner.setdefault(letter, t)
    for key, value in attrs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            sizes.setdefault(key, value)
    op.derive(sizes)
    return sizes


def is_activation(t: Tensor | None) -> bool:
    """Whether this is an activation: live only from its first to its last use in the list."""
    return t is not None and t.role is Role.ACT


Scratch = Callable[[Call], int]  # bytes of scratch that a backend needs for one call
