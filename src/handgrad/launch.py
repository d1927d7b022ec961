"""Launches: an op's `cuda` method returns what one call launches on a GPU, and the cuda backend binds it to memory.

Arguments are words, as in the declaration of a CPU kernel (core/arguments.py): pointers | numbers.

`tma.x` passes a tensor map of the matrix x instead of a pointer; TMA copies it in tiles of TMA_TILE x TMA_TILE bf16.
`tma.x@4096:64x768` maps 64 rows of 768 columns that start at byte 4096 of x.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from handgrad.core.dtypes import BF16
from handgrad.core.op import Call, resolve_pointer
from handgrad.core.tensor import Tensor

TMA_TILE = 64  # rows and bf16 columns of a TMA tile: 128 bytes a row, the span of the 128-byte swizzle


@dataclass(frozen=True)
class Gpu:
    """Features of a GPU and choices of the run. Ops choose their launches by them."""

    arch: str  # what kernels are compiled for, e.g. "sm_90a"
    sms: int
    shared_bytes: int  # most dynamic shared memory of a block
    l2_bytes: int
    has_wgmma: bool = False  # warpgroup matrix multiply-accumulate (Hopper)
    has_tma: bool = False  # bulk copies by tensor maps
    has_library_attention: bool = True
    tf32: bool = False  # float32 matmuls round their operands to TF32
    deterministic: bool = False  # bit-identical runs, for every recompute policy


@dataclass(frozen=True)
class Kernel:
    """One launch of a `__global__` function of a file of the op.

    Integers are passed as `long long`, floats as `float`. The file is compiled with `defines` and with HG_BF16 and
    HG_GRAD_BF16: 1 if the working dtype, or that of parameter gradients, is bf16, else 0.
    """

    entry: str
    args: str
    grid: tuple[int, int, int] | int
    block: int
    shared: int = 0  # bytes of dynamic shared memory
    defines: Mapping[str, int | float] = field(default_factory=dict)
    file: str = "cuda.cu"


@dataclass(frozen=True)
class Gemm:
    """out (m, n) = epilogue(a (m, k) b (k, n)) by cuBLASLt, all row-major; ta: a is stored (k, m); tb: b is (n, k).

    addend      "" | a matrix (m, n) of out's type: out = a b + it; without an epilogue

    epilogue    "" | "bias": + bias (n) | "gelu": aux = that sum, out = gelu(aux) | "dgelu": out = a b * gelu'(aux)
    accumulate  a number word; if its value is not 0: out += a b
    batch       this many products, whose matrices follow one another; more than one has no epilogue
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
    addend: str = ""
    batch: int = 1


@dataclass(frozen=True)
class Sdpa:
    """Attention by cuDNN: direction "forward" or "backward", over packed q, k, v (B, T, (H + 2 K) D).

    window  a token sees the last `window` keys, itself included; 0: all
    scale   the factor of q k'
    """

    direction: str
    B: int
    T: int
    H: int
    K: int
    D: int
    causal: bool
    deterministic: bool
    window: int
    scale: float


@dataclass(frozen=True)
class Collective:
    """What ranks exchange, by NCCL: "all_reduce", "reduce_scatter" or "all_gather", from `send` into `receive`.

    count: elements of an all_reduce, else of a rank's share;  dtype: "f64", "f32" or "bf16"
    """

    kind: str
    send: str
    receive: str
    count: int
    dtype: str


@dataclass(frozen=True)
class Launches:
    """The launches of one call, its bytes of scratch, and a note for the listing.

    alternative: same result up to rounding. The backend times both and binds the faster; with autotuning off it binds
    this one.
    """

    steps: tuple[Kernel | Gemm | Sdpa | Collective, ...]
    scratch: int = 0
    note: str = ""
    alternative: "Launches | None" = None

    def alternatives(self) -> tuple["Launches", ...]:
        """These launches and all alternatives to them."""
        return self, *(self.alternative.alternatives() if self.alternative else ())


def pointer_word(word: str) -> str:
    """A word before `|` without its tensor map: the pointer word of the tensor."""
    return word.removeprefix("tma.").partition(":")[0]


def tensor_map_shape(word: str, c: Call) -> tuple[int, int] | None:
    """(rows, columns) of the matrix that a word before `|` maps; None if it is a plain pointer."""
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
