// The main loop of our GEMMs on Hopper (sm_90a): out (M, N) = a (M, K) b (K, N), bf16 operands, float accumulators.
// ops/lm_loss/exp_gemm.cu and ops/linear/weight_gradient.cu are kernels around it.
//
// layout    a cluster of CLUSTER blocks computes CLUSTER TILE_M x TILE_N of out in steps of TILE_K. In each block one
//           thread loads tiles by TMA into STAGES stages, and WARPGROUPS warpgroups multiply them, 64 rows each. Every
//           block loads a part of b's tile for the whole cluster. Blocks are persistent: loads of the next tile start
//           while the warpgroups finish this one
// Defines (ops/wgmma_gemm.py): TMA_TILE, TILE_M, TILE_N, TILE_K, CLUSTER, WARPGROUPS, STAGES, THREADS, SHARED_BYTES;
//           A_MN: 1 where a is stored (K, M), else (M, K);  B_MN: 1 where b is stored (K, N), else (N, K)
#pragma once
#include "ptx.cuh"
#include "ptx_sm90a.cuh"
#if !defined(TMA_TILE) || !defined(TILE_M) || !defined(TILE_N) || !defined(TILE_K) || !defined(CLUSTER)
#error "ops/wgmma_gemm.py defines the tile sizes"
#endif
#if !defined(WARPGROUPS) || !defined(STAGES) || !defined(THREADS) || !defined(SHARED_BYTES)
#error "ops/wgmma_gemm.py defines the pipeline"
#endif
#if !defined(A_MN) || !defined(B_MN)
#error "the op defines the layout of a and b"
#endif

enum {
  TMA_TILE_BYTES = TMA_TILE * TMA_TILE * 2,
  A_BYTES = TILE_M / TMA_TILE * TMA_TILE_BYTES,
  B_BYTES = TILE_N / TMA_TILE * TMA_TILE_BYTES,
  STAGE_BYTES = A_BYTES + B_BYTES,
  OUTPUT_BYTES = 2 * TMA_TILE_BYTES,  // of a warpgroup: two TMA tiles that alternate on their way out
  OUTPUTS_AT = STAGES * STAGE_BYTES,
  BARRIERS_AT = OUTPUTS_AT + WARPGROUPS * OUTPUT_BYTES,
  ACCUMULATORS = TILE_N / 2  // of a thread
};
static_assert(BARRIERS_AT + 2 * STAGES * 8 + 1024 <= SHARED_BYTES, "shared memory holds the pipeline");
static_assert(THREADS == 128 * (WARPGROUPS + 1) && TILE_M == 64 * WARPGROUPS && TILE_K == TMA_TILE, "sizes agree");

// The stages of a block: `full` completes when a stage's bytes have arrived, `empty` when all warpgroups of the cluster
// have read it.
struct Pipeline {
  char *stages;
  u64 *full, *empty;
  int stage, phase;
  __device__ __forceinline__ Pipeline(char *shared) : stages(shared), stage(0), phase(0) {
    full = (u64 *)(shared + BARRIERS_AT);
    empty = full + STAGES;
  }
  // Called by all threads of the cluster.
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; s++) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, WARPGROUPS * CLUSTER);
      }
      barrier_init_done();
    }
    __syncthreads();
    cluster_sync();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage, phase); }
  __device__ __forceinline__ void release(int s) const {  // by CLUSTER threads of a warpgroup, one for each block
    if (threadIdx.x % 128 < CLUSTER) barrier_arrive(empty + s, threadIdx.x % 128);
  }
  // Waits until the stage is free, announces its bytes, and loads step k of the tile at (row, column).
  __device__ __forceinline__ void load(const TensorMap *a, const TensorMap *b, int row, int column, int k,
                                       int rank) const {
    barrier_wait(empty + stage, phase ^ 1);
    barrier_expect(full + stage, STAGE_BYTES);
    char *to = stages + stage * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < TILE_M / TMA_TILE; i++, to += TMA_TILE_BYTES) {
      int at = row + TMA_TILE * i;
      tma_load(to, a, A_MN ? at : k * TILE_K, A_MN ? k * TILE_K : at, full + stage);
    }
#pragma unroll
    for (int i = 0; i < TILE_N / TMA_TILE / CLUSTER; i++) {
      int j = rank * (TILE_N / TMA_TILE / CLUSTER) + i, at = column + TMA_TILE * j;
      int x = B_MN ? at : k * TILE_K, y = B_MN ? k * TILE_K : at;
      tma_load(to + j * TMA_TILE_BYTES, b, x, y, full + stage, (1 << CLUSTER) - 1);
    }
  }
};

// The thread that loads: every step of every tile of its cluster.
template <class Tiles>
__device__ __forceinline__ void load_tiles(Pipeline &pipe, const Tiles &tiles, const TensorMap *a, const TensorMap *b,
                                           int rank) {
  TileSteps at;
  int m, n;
  for (int i = 0; tiles.get(i, blockIdx.x / CLUSTER, at); i++) {
    tiles.coordinates(at.tile, m, n);
    int row = (m * CLUSTER + rank) * TILE_M, column = n * TILE_N;
    for (int k = at.k0; k < at.k1; k++) {
      pipe.load(a, b, row, column, k, rank);
      pipe.advance();
    }
  }
}

// acc = a warpgroup's 64 rows of a tile, summed over `steps` steps. `overlapped(a)` runs once a step while the tensor
// cores work on it; `a` is where the warpgroup's rows of the step lie in shared memory.
template <class Overlapped>
__device__ __forceinline__ void multiply(float *acc, Pipeline &pipe, int group, int steps, Overlapped overlapped) {
  int last = 0;
  for (int k = 0; k < steps; k++) {
    pipe.wait_full();
    const char *a = pipe.stages + pipe.stage * STAGE_BYTES + group * TMA_TILE_BYTES;
    const char *b = pipe.stages + pipe.stage * STAGE_BYTES + A_BYTES;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; s++) {
      u64 x = wgmma_operand(a + s * (A_MN ? 2048 : 32), TMA_TILE_BYTES);
      u64 y = wgmma_operand(b + s * (B_MN ? 2048 : 32), TMA_TILE_BYTES);
      Wgmma<TILE_N>::template run<A_MN, B_MN>(acc, x, y, k + s > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0) pipe.release(last);
    overlapped(a);
    last = pipe.stage;
    pipe.advance();
  }
  wgmma_wait<0>();
  pipe.release(last);
}

// The start of dynamic shared memory, aligned as the swizzle of TMA needs it.
__device__ __forceinline__ char *align_shared(char *raw) { return raw + (1024 - shared_address(raw) % 1024) % 1024; }
