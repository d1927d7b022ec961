"""How a call runs on a GPU: the launches that an op declares, in order. The backend binds them; core only names them.

Arguments are words, as in a CPU kernel's declaration: names of inputs and outputs, `scalars`, `scratch`, each with an
optional `@bytes` after it, and after `|` sizes, attributes and `acc.dw` (1 when dw already holds a value of this step).
`boxes.x` is a map of the matrix x for Hopper's copy engine, in boxes of 64 rows of 64 bf16.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from handgrad.core.dtypes import BF16, DType

if TYPE_CHECKING:
    from handgrad.core.op import Call
    from handgrad.core.tensor import Tensor


@dataclass(frozen=True)
class Gpu:
    """What an op may ask of the card, and of the run, before it declares its launches."""

    name: str = "NVIDIA H100 80GB HBM3"
    arch: str = "sm_90a"
    sms: int = 132  # streaming multiprocessors
    shared: int = 227 * 1024  # bytes of shared memory that one block can ask for
    cudnn: bool = True  # the attention library is there
    tf32: bool = False  # float32 products may round their factors to 10 bits
    deterministic: bool = False  # same bits every time, whatever is recomputed

    @property
    def is_hopper(self) -> bool:
        """Whether kernels may use Hopper's own instructions: warp groups that multiply, the copy engine."""
        return self.arch == "sm_90a"

    def multiplies_on_hopper(self, dtype: DType, *rows: int) -> bool:
        """Whether our own product for Hopper multiplies matrices with rows of so many elements."""
        return self.is_hopper and dtype is BF16 and not any(row % 8 for row in rows)


@dataclass(frozen=True)
class Kernel:
    """One launch of a `__global__` function of a file of the op. Pointers come as such, whole numbers as `long long`,
    others as `float`. Compiled with HG_BF16 and HG_GRAD_BF16 as 0 or 1, and with `defines`."""

    entry: str
    args: str
    grid: tuple[int, int, int] | int
    block: int
    shared: int = 0  # bytes of dynamic shared memory
    defines: dict[str, int | float] = field(default_factory=dict)
    file: str = "cuda.cu"


@dataclass(frozen=True)
class Gemm:
    """out (m, n) = epilogue(a (m, k) b (k, n)), all row-major; ta: a lies as (k, m); tb: b lies as (n, k).

    epilogue  "" | "bias": + bias (n) | "gelu": aux = that sum, out = gelu(aux) | "dgelu": out = product * gelu'(aux)
              "exp": out = e^r, r = product - bias (m) float, rounded, in the first `width` columns and 0 in the others;
              sums (ceil(n / 256), m) float = row sums of each 256 columns of out, before it is rounded
    adds      False; True: out += product; or the name of a inout output: adds just where `acc.NAME` or a later
              micro-batch say so
    sums      without "exp": (m) of out's dtype = row sums of a, or += where out is added to
    "exp", which needs k >= 512, and sums are our own product's, for cards of which Gpu.multiplies_on_hopper says so.
    """

    out: str
    a: str
    b: str
    m: int
    n: int
    k: int
    ta: bool = False
    tb: bool = False
    epilogue: str = ""
    bias: str = ""
    aux: str = ""
    adds: bool | str = False
    sums: str = ""
    width: int = 0

    @property
    def own(self) -> bool:
        """Whether our own kernel computes it."""
        return bool(self.sums)


@dataclass(frozen=True)
class Sdpa:
    """Attention by the library: direction "forward" or "backward", over packed q, k, v (B, T, (H + 2 K) D)."""

    direction: str
    B: int
    T: int
    H: int
    K: int
    D: int
    causal: bool
    deterministic: bool


@dataclass(frozen=True)
class Launches:
    """What one call does, the scratch it needs in bytes, and what the listing says of the choice.

    instead: another way to the same values, up to rounding; the card binds the faster by its clock, or this one if it
    may not ask the clock
    """

    steps: tuple[Kernel | Gemm | Sdpa, ...]
    scratch: int = 0
    note: str = ""
    instead: "Launches | None" = None

    def ways(self) -> tuple["Launches", ...]:
        """This way and the others."""
        return self, *(self.instead.ways() if self.instead else ())


def pointers(k: Kernel) -> tuple[tuple[str, bool], ...]:
    """Of each word before `|`: the word, without its prefix, and whether a map of boxes is passed."""
    words = k.args.partition("|")[0].split()
    return tuple((word.removeprefix("boxes."), word.startswith("boxes.")) for word in words)


def place(word: str, c: "Call") -> tuple["Tensor | str | None", int]:
    """(tensor, "scalars", "scratch" or None for one that is absent; offset in bytes) of a pointer's word."""
    name, _, offset = word.partition("@")
    return (name if name in ("scalars", "scratch") else getattr(c, name)), int(offset or 0)


def number(word: str, c: "Call") -> int | float:
    """The value of a word after `|`."""
    if word.startswith("acc."):
        return int(word[4:] not in c.first)
    value = c.sizes[word] if word in c.sizes else c.attrs[word]
    return value if isinstance(value, float) else int(value)
