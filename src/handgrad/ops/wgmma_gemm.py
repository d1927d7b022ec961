"""Tile sizes and limits of our GEMM for Hopper, and how an op launches it.

backends/cuda/include/wgmma_gemm.cuh is its main loop. lm_loss (exp_gemm.cu) and linear (weight_gradient.cu) have
kernels around it, because cuBLASLt has no epilogue for what they fuse into the GEMM.
"""

from handgrad.core.dtypes import BF16, DType
from handgrad.launch import TMA_TILE, Gpu, Kernel

TILE_M, TILE_N, TILE_K = 128, 256, 64  # of out (M, N) and of K, for one block and one step
CLUSTER = 2  # blocks that compute vertical neighbours and share each tile of b
WARPGROUPS = 2  # that multiply, 64 rows of the tile each; one more loads
STAGES = 4
THREADS = 128 * (WARPGROUPS + 1)
CLUSTER_M = CLUSTER * TILE_M

_OPERANDS = STAGES * (TILE_M + TILE_N) * TILE_K * 2  # bytes of a and b in flight
_OUTPUTS = WARPGROUPS * 2 * TMA_TILE * TMA_TILE * 2  # bytes of two TMA tiles a warpgroup, on their way out
SHARED_BYTES = _OPERANDS + _OUTPUTS + 16 * STAGES + 1024  # two barriers a stage; alignment to 1024 bytes
TILES = {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K, "CLUSTER": CLUSTER, "WARPGROUPS": WARPGROUPS}
DEFINES = TILES | {"STAGES": STAGES, "THREADS": THREADS, "SHARED_BYTES": SHARED_BYTES, "TMA_TILE": TMA_TILE}


def supports(gpu: Gpu, dtype: DType, *columns: int) -> bool:
    """Whether a GPU can multiply matrices of this dtype with so many columns: TMA wants rows of whole 16 bytes."""
    return gpu.has_wgmma and gpu.has_tma and dtype is BF16 and not any(n % 8 for n in columns)


def clusters(gpu: Gpu) -> int:
    """Clusters that run at the same time, on all SMs."""
    return gpu.sms // CLUSTER


def launch(entry: str, args: str, gpu: Gpu, file: str, **defines: int) -> Kernel:
    """A launch of persistent clusters on every SM.

    defines: A_MN and B_MN, 1 where a is stored (K, M), where b is stored (K, N)
    """
    return Kernel(entry, args, clusters(gpu) * CLUSTER, THREADS, SHARED_BYTES, DEFINES | defines, file)
