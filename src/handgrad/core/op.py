"""Op: a kernel someone wrote on purpose, declared with shapes, gradient rule, implementations and cases.

Arguments are declared in one line each, `name:DIMS[:dtype][?]`, separated by spaces:

    ins  = "x:N,C h:N,C w:C b:C?"           letters are unified over all inputs; `?` may be absent
    outs = "s:N,C y:N,C mean:N:f32 +dw:C:f32"

The dtype is the program's working dtype unless given; `grad` is that of its parameter gradients. An output with `+` is
not made by the call but given to it (`into=`) and read as well as written: a parameter gradient, a parameter in an
update, a cache.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handgrad.core.dtypes import DTYPES, F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.tensor import Tensor

if TYPE_CHECKING:
    from handgrad.core.program import Call, Program


@dataclass(frozen=True)
class Arg:
    """One declared input or output."""

    name: str
    dims: tuple[str, ...]
    kind: str  # a dtype's name, "grad", or "" for the program's working dtype
    optional: bool
    inout: bool  # `+`: read and written, made elsewhere

    def dtype(self, working: DType, grad: DType = F32) -> DType:
        """Its element type in a program of these."""
        return grad if self.kind == "grad" else DTYPES[self.kind] if self.kind else working


def parse_args(text: str) -> tuple[Arg, ...]:
    """The declared arguments of one line, in order."""
    args = []
    for word in text.split():
        name, dims, *dtype = word.rstrip("?").split(":")
        args.append(
            Arg(
                name.lstrip("+"),
                tuple(dims.split(",")),
                dtype[0] if dtype else "",
                word.endswith("?"),
                word.startswith("+"),
            )
        )
    return tuple(args)


@dataclass(frozen=True)
class C:
    """A CPU kernel: its entry point and its arguments, outputs first: tensors | sizes and attributes.

    Words are argument names, dimension letters or attributes; `scalars` and `scratch` are pointers, and `acc.dw` is 1
    when the inout output dw already holds a value in this step. `scratch` names the library's size function and its
    arguments ("threads" is the number of threads).
    """

    entry: str
    args: str
    scratch: str = ""


@dataclass(frozen=True)
class Case:
    """One set of sizes and attributes. Every case serves four modes: check, grad, bench, support.

    `real` names the model whose shape it is; only such cases are timed, and they are left out of gradient checks.
    """

    sizes: dict[str, Any]
    real: str = ""
    without: tuple[str, ...] = ()  # optional inputs and inout outputs that are absent


def case(real: str = "", without: str = "", **sizes: Any) -> Case:
    """A case from keyword arguments: `case(N=7, C=33, eps=1e-5, without="b")`."""
    return Case(sizes, real, tuple(without.split()))


class Op:
    """Base of every op; subclasses are final and hold no state. One instance per op, in `handgrad.ops`."""

    name: str = ""
    ins: str = ""
    outs: str = ""
    saved: str = ""  # names of inputs and outputs that the gradient rule reads; all else is free after the call
    attrs: dict[str, type] = {}
    starts_gradient: bool = False  # it makes the gradient of its inputs itself, in the forward stretch (lm_loss)
    beside: bool = False  # a backend may run it at the same time as the call after it, which does not need it
    ill_conditioned: bool = (
        False  # sums far larger than its outputs cancel or stand in an exponent: last bits of inputs count
    )
    cpu: C | None = None
    cases: tuple[Case, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.in_args = parse_args(cls.ins)
        cls.out_args = parse_args(cls.outs)

    in_args: tuple[Arg, ...]
    out_args: tuple[Arg, ...]

    def derive(self, d: dict[str, int]) -> None:
        """Adds dimensions that follow from others, and checks what letters alone cannot say."""

    def backward(self, g: "Program", c: "Call", d: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Appends gradient calls; returns the gradients of the activation inputs by input name.

        `d` holds the gradient of each output (None where nothing reads it). `g.take(c.x)` removes and returns a
        gradient that input x already has from a later reader, for rules whose kernel can add to it.
        """
        raise HandgradError(self.name, "this op has no gradient", hint="it belongs after backward or in inference")

    def makes(self, out: str, attrs: dict[str, Any], dtype: DType) -> bool:
        """Whether an optional output exists under these attributes and working dtype."""
        return True

    def recompute(self, g: "Program", c: "Call", want: set[str]) -> dict[str, Tensor]:
        """Emits what brings back the dropped outputs `want`; by default the whole call again."""
        outs = g.emit_call(self, c.ins, c.attrs)
        return {arg.name: out for arg, out in zip(self.out_args, outs)}

    def flops(self, c: "Call") -> int:
        """Multiply and add count of one call, for MFU and `handgrad ops bench`; 0 for ops bound by memory."""
        return 0

    def nbytes(self, c: "Call") -> int:
        """Bytes that one call must move: every argument once (inout outputs twice)."""
        total = sum(t.nbytes for t in c.ins if t is not None)
        for arg, out in zip(self.out_args, c.outs):
            total += 0 if out is None else out.nbytes * (2 if arg.inout and arg.name not in c.first else 1)
        return total

    def cuda(self, c: "Call", gpu: Any) -> Any:
        """The `Launches` of one call on a `Gpu` (handgrad.launch)."""
        raise NotImplementedError

    def ref(self, v: Any) -> tuple:
        """The oracle: outputs in order from a namespace of inputs, inout outputs, sizes and attributes (numpy).

        `v.round(x)` is x as the working dtype stores it, for values that are kept and read again by the same call.
        """
        raise NotImplementedError

    def sample(self, rng: Any, arg: Arg, shape: tuple[int, ...], v: dict[str, Any]) -> Any:
        """A random array for an input of a case, or None for the default (standard normal)."""
        return None

    @property
    def folder(self) -> Path:
        """Where the op's files lie."""
        return Path(sys.modules[type(self).__module__].__file__).parent

    def __repr__(self) -> str:
        return self.name


def bind_dims(op: Op, ins: tuple[Tensor | None, ...], attrs: dict[str, Any], where: str) -> dict[str, int]:
    """The size of every letter of a call; raises with the names of the two tensors that disagree."""
    sizes: dict[str, int] = {}
    owner: dict[str, Tensor] = {}
    if len(ins) != len(op.in_args):
        raise HandgradError(
            op.name, f"takes {len(op.in_args)} inputs ({op.ins})", len(ins), context=f"recorded at {where}"
        )
    for arg, t in zip(op.in_args, ins):
        if t is None:
            if not arg.optional:
                raise HandgradError(op.name, f"needs input '{arg.name}'", "nothing", context=f"recorded at {where}")
            continue
        if len(t.shape) != len(arg.dims):
            raise HandgradError(
                op.name,
                f"{arg.name} has dimensions ({','.join(arg.dims)})",
                f"'{t.name}' of shape {t.shape}",
                context=f"recorded at {where}",
            )
        for letter, size in zip(arg.dims, t.shape):
            if sizes.setdefault(letter, size) != size:
                other = owner[letter]
                raise HandgradError(
                    op.name,
                    f"{letter} is {sizes[letter]} in '{other.name}' {other.shape}",
                    f"{size} in '{t.name}' {t.shape}",
                    context=f"recorded at {where}",
                    hint="a size in the model's configuration and a tensor disagree",
                )
            owner.setdefault(letter, t)
    for key, value in attrs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            sizes.setdefault(key, value)
    op.derive(sizes)
    return sizes


Scratch = Callable[["Call"], int]  # bytes of scratch that a backend needs for one call
