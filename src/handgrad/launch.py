"""The vocabulary in which an op's `cuda` method says what one call launches. The cuda backend binds the launches.

Arguments are words, as in a CPU kernel's declaration (core/arguments.py): pointers | numbers.

`tma.x` passes a tensor map of the matrix x instead of a pointer: TMA moves it in tiles of TMA_TILE x TMA_TILE bf16.
`tma.x@4096:64x768` maps 64 rows of 768 columns that start at byte 4096 of x.
"""

from dataclasses import dataclass, field

from handgrad.core.dtypes import BF16
from handgrad.core.op import Call, resolve_pointer
from handgrad.core.tensor import Tensor

TMA_TILE = 64  # rows, and bf16 columns, of a TMA tile: its rows of 128 bytes are what the 128-byte swizzle spans


@dataclass(frozen=True)
class Gpu:
    """Features of a GPU, and choices of the run, that an op may look at before it declares its launches."""

    arch: str  # what kernels are compiled for, e.g. "sm_90a"
    sms: int
    shared_bytes: int  # most dynamic shared memory of one block
    l2_bytes: int
    has_wgmma: bool = False  # warpgroup matrix multiplies that read shared memory
    has_tma: bool = False  # bulk copies through tensor maps
    has_library_attention: bool = True
    tf32: bool = False  # float32 matmuls round their operands to TF32
    deterministic: bool = False  # same bits in every run, whatever is recomputed


@dataclass(frozen=True)
class Kernel:
    """One launch of a `__global__` function of a file of the op.

    Whole numbers are passed as `long long`, others as `float`. The file is compiled with HG_BF16 and HG_GRAD_BF16 as 0
    or 1 (the working dtype, the dtype of parameter gradients) and with `defines`.
    """

    entry: str
    args: str
    grid: tuple[int, int, int] | int
    block: int
    shared: int = 0  # bytes of dynamic shared memory
    defines: dict[str, int | float] = field(default_factory=dict)
    file: str = "cuda.cu"


@dataclass(frozen=True)
class Gemm:
    """out (m, n) = epilogue(a (m, k) b (k, n)) by the library, all row-major; ta: a is stored (k, m); tb: b is (n, k).

    epilogue    "" | "bias": + bias (n) | "gelu": aux = that sum, out = gelu(aux) | "dgelu": out = a b * gelu'(aux)
    accumulate  a number word: out += a b where it is not 0
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
    accumulate: str = "0"


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
    """What one call launches, the scratch it needs in bytes, and what the listing says of the choice.

    alternative: same result up to rounding. The backend times both and binds the faster; with autotuning off it binds
    this one.
    """

    steps: tuple[Kernel | Gemm | Sdpa, ...]
    scratch: int = 0
    note: str = ""
    alternative: "Launches | None" = None

    def alternatives(self) -> tuple["Launches", ...]:
        """These launches and all that may replace them."""
        return self, *(self.alternative.alternatives() if self.alternative else ())


def pointer_word(word: str) -> str:
    """The word of the tensor that a word before `|` passes, itself or by a tensor map."""
    return word.removeprefix("tma.").partition(":")[0]


def tensor_map_shape(word: str, c: Call) -> tuple[int, int] | None:
    """(rows, columns) of the matrix that a word before `|` maps; None for a plain pointer."""
    if not word.startswith("tma."):
        return None
    _, _, shape = word.partition(":")
    if shape:
        rows, columns = shape.split("x")
        return int(rows), int(columns)
    tensor, _ = resolve_pointer(pointer_word(word), c)
    assert isinstance(tensor, Tensor), word
    return tensor.shape[0], tensor.shape[1]


def type_defines(c: Call) -> dict[str, int]:
    """HG_BF16 and HG_GRAD_BF16 of a call's kernels."""
    args = (*zip(c.op.in_args, c.ins), *zip(c.op.out_args, c.outs))
    grads = {t.dtype for arg, t in args if arg.kind == "grad" and t is not None}
    return {"HG_BF16": int(c.dtype is BF16), "HG_GRAD_BF16": int(BF16 in grads)}
