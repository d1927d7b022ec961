"""Tile sizes and limits of our GEMM for Hopper, and how an op launches it.

backends/cuda/include/wgmma_gemm.cuh is its main loop. lm_loss (exp_gemm.cu) and linear (weight_gradient.cu) have
kernels around it, because cuBLASLt has no epilogue for what they fuse into their GEMMs.
"""

from handgrad.core.dtypes import BF16, DType
from handgrad.launch import TMA_TILE, Gpu, Kernel

TILE_M, TILE_N, TILE_K = 128, 256, 64  # a block computes (TILE_M, TILE_N) of out, in steps of TILE_K
CLUSTER = 2  # blocks that compute vertically adjacent tiles and share each tile of b
WARPGROUPS = 2  # that compute, 64 rows of the tile each; one more warpgroup loads
STAGES = 4
THREADS = 128 * (WARPGROUPS + 1)
CLUSTER_M = CLUSTER * TILE_M

_OPERANDS = STAGES * (TILE_M + TILE_N) * TILE_K * 2  # bytes of a and b in flight
_OUTPUTS = WARPGROUPS * 2 * TMA_TILE * TMA_TILE * 2  # bytes of two output TMA tiles per warpgroup
SHARED_BYTES = _OPERANDS + _OUTPUTS + 16 * STAGES + 1024  # two barriers a stage; alignment to 1024 bytes
TILES = {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K, "CLUSTER": CLUSTER, "WARPGROUPS": WARPGROUPS}
DEFINES = TILES | {"STAGES": STAGES, "THREADS": THREADS, "SHARED_BYTES": SHARED_BYTES, "TMA_TILE": TMA_TILE}


def supports(gpu: Gpu, dtype: DType, *columns: int) -> bool:
    """Whether this GEMM takes matrices of this dtype and these numbers of columns: TMA needs rows of whole 16 bytes."""
    return gpu.has_wgmma and gpu.has_tma and dtype is BF16 and not any(n % 8 for n in columns)


def clusters(gpu: Gpu) -> int:
    """Clusters that run at the same time."""
    return gpu.sms // CLUSTER


def launch(entry: str, args: str, gpu: Gpu, file: str, **defines: int) -> Kernel:
    """A launch of persistent clusters on all SMs.

    defines: A_MN is 1 if a is stored (K, M), B_MN if b is stored (K, N)
    """
    return Kernel(entry, args, clusters(gpu) * CLUSTER, THREADS, SHARED_BYTES, DEFINES | defines, file)
