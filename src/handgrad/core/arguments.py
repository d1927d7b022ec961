"""Arguments: how an op declares its inputs and outputs, and the arguments of its kernels.

Inputs and outputs are lines of words `name:DIMS[:dtype][?]`:

    ins  = "x:N,C h:N,C w:C b:C?"           a letter is one size in all inputs; `?` marks optional ones
    outs = "s:N,C y:N,C mean:N:f32 +dw:C:grad"

Without a dtype a tensor has the program's working dtype; `grad` is the dtype of parameter gradients. `+` marks an inout
output: the caller passes an existing tensor (`into=`), which the kernel may read and write.

The arguments of a kernel are a line of words, pointers | numbers:

    "dx dw dy x scalars scratch | N M K eps accumulate.dw"

A pointer is an input, an output, `scalars` (the step scalars) or `scratch`, with an optional `@bytes` offset, or `null`
where only other ops of the same kernel pass a tensor. A number is a dimension, an attribute, an integer, or
`accumulate.dw`: 1 if dw already holds a value of this step, else 0.
"""

from dataclasses import dataclass

from handgrad.core.dtypes import DTYPES, F32, DType

ACCUMULATE = "accumulate."


@dataclass(frozen=True)
class Arg:
    """One declared input or output."""

    name: str
    dims: tuple[str, ...]
    kind: str  # a dtype's name, "grad", or "" for the program's working dtype
    optional: bool
    inout: bool

    @property
    def letters(self) -> set[str]:
        """The letters of its dimensions."""
        return {d for d in self.dims if not d.isdigit()}

    def dtype(self, working: DType, grad: DType = F32) -> DType:
        """Its element type in a program of these dtypes."""
        return grad if self.kind == "grad" else DTYPES[self.kind] if self.kind else working


def parse_args(text: str) -> tuple[Arg, ...]:
    """The declared arguments of one line, in order."""
    args = []
    for word in text.split():
        name, dims, *dtype = word.rstrip("?").split(":")
        kind = dtype[0] if dtype else ""
        args.append(Arg(name.lstrip("+"), tuple(dims.split(",")), kind, word.endswith("?"), word.startswith("+")))
    return tuple(args)


def kernel_words(args: str) -> tuple[list[str], list[str]]:
    """(pointers, numbers) of a kernel's line of arguments."""
    pointers, _, numbers = args.partition("|")
    return pointers.split(), numbers.split()
