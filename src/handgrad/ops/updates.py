"""What the update ops of optimizers share: the slice that they update, its weights in halves, their launches.

backends/cpu/include/weights.h and backends/cuda/include/weights.cuh read and write the weights.
"""

from collections.abc import Mapping
from typing import Any

from handgrad.core.arguments import Arg
from handgrad.core.dtypes import BF16, F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.op import Call
from handgrad.launch import Gpu, Kernel, Launches

THREADS = 256  # of a block


def check_start(name: str, d: dict[str, int], multiple: int = 4) -> None:
    """Raises HandgradError unless a slice starts where a draw of random bits does."""
    if d["start"] % multiple:
        raise HandgradError(name, f"a slice starts at a multiple of {multiple} elements", d["start"])


def keeps_low(attrs: dict[str, Any], dtype: DType) -> bool:
    """Whether the weights of a case have low halves: an f32 p is the whole weight."""
    return dtype is not F32 and attrs.get("low", True)


def sample(rng: Any, arg: Arg, shape: tuple[int, ...]) -> Any:
    """Random low halves, and second moments, which are means of squares; None for other arguments."""
    if arg.name == "low":
        return rng.integers(-(1 << 15), 1 << 15, shape, dtype="int16")
    return rng.random(shape) if arg.name in ("v", "row", "col") else None


def launch(
    c: Call, gpu: Gpu, args: str, defines: Mapping[str, int | float], held: int = 4, file: str = "cuda.cu"
) -> Launches:
    """A kernel of the op's name in a grid that fills the GPU: `held` blocks per SM, limited by registers."""
    defines = {**slice_defines(c), "THREADS": THREADS, "HELD": held, **defines}
    grid = min(-(-c.sizes["n"] // (4 * THREADS)), gpu.sms * held)
    return Launches((Kernel(f"{c.op.name}_kernel", args, grid, THREADS, 0, defines, file),))


def slice_defines(c: Call) -> dict[str, int | float]:
    """What weights.cuh needs to know of a call."""
    return {"VEC": 4 if c.sizes["n"] % 4 == 0 else 1, "LOW": int(c.low is not None and c.dtype is BF16)}
