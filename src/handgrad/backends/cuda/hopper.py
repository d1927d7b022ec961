"""Our own product for Hopper (hopper.cu): bound where an op asks for what cuBLASLt cannot do, or does slowly."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handgrad.backends.cuda.card import OWN_TILE, own_tiles
from handgrad.backends.cuda.driver import Module, launcher, tensor_map
from handgrad.backends.cuda.nvrtc import Source
from handgrad.core.dtypes import BF16
from handgrad.core.launch import Gemm, Gpu, place
from handgrad.core.op import Call

BOX = 64  # rows, and elements of 128 bytes, of what the copy engine brings at once
TILE_M, TILE_N, STAGES, CLUSTER, THREADS = 128, 256, 4, 2, 384  # mirrors hopper.cu and work.cuh
SHARED = (STAGES * (TILE_M + TILE_N) + 4 * BOX) * BOX * 2 + 16 * STAGES + 1024  # bytes; 1024 to align


def source(g: Gemm, c: Call, gpu: Gpu) -> Source:
    """What must be compiled for a product."""
    defines = {
        "HG_BF16": 1,
        "HG_GRAD_BF16": int(place(g.out, c)[0].dtype is BF16),
        "A_MN": int(g.ta),
        "B_MN": int(not g.tb),
        "EXPONENTIALS": int(g.epilogue == "exp"),
    }
    return Source(str(Path(__file__).with_name("hopper.cu")), gpu.arch, tuple(sorted(defines.items())))


def bind(
    g: Gemm, c: Call, gpu: Gpu, module: Module, address: Callable[[str], int], workspace: int, stream: Any
) -> Callable[[], None]:
    """A function that starts the product; workspace: the address of `gemm_workspace` bytes."""
    pointer, number = ctypes.c_void_p, ctypes.c_longlong
    clusters = gpu.sms // CLUSTER
    a = tensor_map(address(g.a), *((g.k, g.m) if g.ta else (g.m, g.k)), BOX)
    b = tensor_map(address(g.b), *((g.n, g.k) if g.tb else (g.k, g.n)), BOX)
    out = tensor_map(address(g.out), g.m, g.n, BOX) if g.epilogue else a  # what a kernel does not read may be anything
    shift, sums = (address(word) if word else 0 for word in (g.bias, g.sums))
    room = [pointer(workspace), pointer(address("scalars"))]
    sizes = [number(n) for n in (g.m, g.n, g.k)]
    adds = g.adds is True or (isinstance(g.adds, str) and g.adds not in c.first)
    product = launcher(
        stream,
        module.function("product_kernel", SHARED),
        (clusters * CLUSTER, 1, 1),
        THREADS,
        SHARED,
        [
            a,
            b,
            out,
            pointer(address(g.out)),
            pointer(shift),
            pointer(sums),
            *room,
            *sizes,
            number(g.width),
            number(adds),
        ],
    )
    if g.epilogue:
        return product
    rows, (_, rest) = -(-g.m // OWN_TILE), own_tiles(g, gpu)
    pieces = launcher(
        stream,
        module.function("product_pieces_kernel", 0),
        (4 * (rest + rows), TILE_N // 32, 1),
        128,
        0,
        [pointer(address(g.out)), pointer(sums), *room, *sizes, number(clusters), number(adds)],
    )

    def start() -> None:
        product()
        pieces()

    return start
