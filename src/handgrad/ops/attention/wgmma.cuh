// Attention on Hopper (sm_90a): which rows a block computes when, tiles that stream through shared memory, matmuls
// whose A operand stays in registers. forward_wgmma.cu and backward_wgmma.cu build on it.    math: README.md §2, §3, §7
//
// needs     D = TMA_TILE, T a multiple of ROWS, no dropout, no window, no optional input
// layout    in each block WARPGROUPS warpgroups multiply, TILE rows each, and one thread loads. Blocks are persistent:
//           they take one block of ROWS rows after another, and TMA loads the next one while this one is computed
// numerics  bf16 operands, float accumulators
// source    own work, after Dao 2023 (FlashAttention-2) and Shah et al. 2024 (FlashAttention-3)
//
// Defines (op.py): TMA_TILE, WARPGROUPS, THREADS, STAGES, SHARED_BYTES, CAUSAL, TOGETHER (heads whose row blocks run
// side by side).
#pragma once
#include "ptx.cuh"
#include "ptx_sm90a.cuh"
#if !defined(TMA_TILE) || !defined(WARPGROUPS) || !defined(THREADS) || !defined(STAGES) || !defined(SHARED_BYTES)
#error "attention/op.py defines the sizes"
#endif
#if !defined(CAUSAL) || !defined(TOGETHER)
#error "attention/op.py defines CAUSAL and TOGETHER"
#endif

enum {
  TILE = TMA_TILE,              // rows of a tile
  D = TMA_TILE,                 // elements of a row
  TILE_BYTES = TILE * D * 2,    // rows of 128 bytes, swizzled
  STEPS = D / 16,               // of a matmul over D, or over the rows of a tile
  SUMS = TILE * D / 128,        // accumulators of a thread, for a tile of scores or of outputs
  ROWS = WARPGROUPS * TILE      // of a block
};
static_assert(THREADS == 128 * (WARPGROUPS + 1), "one more warpgroup loads");
#define LOG2E 1.4426950408889634f

// The number of a thread's warpgroup; the shuffle tells the compiler that it is uniform in a warp, so that branches on
// it do not diverge.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// A row block of a head. Level 0 has the most tiles.
struct RowBlock { int level, head; };

// The row block that this block takes in a round; false if none is left. TOGETHER heads at a time, so that what they
// stream stays in L2; among them the longest row blocks first. Every other round runs backwards: no block gets the
// longest twice.
__device__ __forceinline__ bool row_block(RowBlock &at, int round, int levels, int heads) {
  int i = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  int first = i / (TOGETHER * levels) * TOGETHER, within = i % (TOGETHER * levels);
  int size = min(TOGETHER, heads - first);
  at = {within / max(size, 1), first + within % max(size, 1)};
  return i < levels * heads;
}

// A ring of stages: `full` completes when a stage's bytes have arrived, `empty` when every warp has released it.
template <int stages> struct Ring {
  u64 *full, *empty;
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void init() const {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 4 * WARPGROUPS);
    }
  }
  // For the thread that loads: waits until the stage is free, then announces bytes.
  __device__ __forceinline__ u64 *fill(int bytes) const {
    barrier_wait(empty + stage, phase ^ 1);
    barrier_expect(full + stage, bytes);
    return full + stage;
  }
  __device__ __forceinline__ void wait() const { barrier_wait(full + stage, phase); }
};

// Shared memory of a block: the tiles that stream through the stages, and those of the row block (`own`).
struct Shared {
  char *base;
  Ring<STAGES> ring;
  Ring<1> own;
  __device__ __forceinline__ Shared(char *raw, int barriers_at) {
    base = raw + (1024 - shared_address(raw) % 1024) % 1024;  // the swizzle needs this alignment
    u64 *barriers = (u64 *)(base + barriers_at);
    ring.full = barriers;
    ring.empty = barriers + STAGES;
    own.full = barriers + 2 * STAGES;
    own.empty = barriers + 2 * STAGES + 1;
  }
  // Called by all threads of the block.
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      ring.init();
      own.init();
      barrier_init_done();
    }
    __syncthreads();
  }
};

// Ping-pong between warpgroups: they issue matmuls in turn. Otherwise both would issue all their matmuls, wait for all
// of them, and leave the tensor cores idle while both compute exponentials. Both take the same number of turns.
__device__ __forceinline__ void ping_pong_wait(int group) { sync_warpgroups(3 + group); }
__device__ __forceinline__ void ping_pong_arrive(int group) { arrive_warpgroups(4 - group); }

// A warp releases a stage.
__device__ __forceinline__ void release(u64 *empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// f = a warp's 16 rows of a tile, as the A operand of a matmul over D
__device__ __forceinline__ void load_operand_a(u32 (&f)[STEPS][4], const char *tile) {
  int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < STEPS; k++) load_matrix(f[k], tile + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16);
}
// s = a b', over D; b is a `wgmma_operand`, whose low bits count 16 bytes
__device__ __forceinline__ void scores(float (&s)[SUMS], const u32 (&a)[STEPS][4], u64 b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) wgmma_registers<0>(s, a[k], b + k * (32 >> 4), k > 0);
}
// o += p b, over the rows of b
__device__ __forceinline__ void pv_gemm(float (&o)[SUMS], const u32 (&p)[STEPS][4], u64 b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) wgmma_registers<1>(o, p[k], b + k * (2048 >> 4), 1);
}
// Scores as the A operand of the next matmul: accumulators and A operands have the same layout in registers.
__device__ __forceinline__ void to_operand_a(u32 (&p)[STEPS][4], const float (&s)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS / 2; i++) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}
__device__ __forceinline__ void clear(float (&o)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) o[i] = 0.0f;
  wgmma_settle(o);
}
// In a tile on the diagonal, scores become -inf where the key comes after the query; `transposed`: rows are keys.
template <bool transposed> __device__ __forceinline__ void causal_mask(float (&s)[SUMS]) {
  int lane = threadIdx.x % 32;
  int x = threadIdx.x % 128 / 32 * 16 + lane / 4 - lane % 4 * 2;  // the thread's first row minus its first column
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    const int row = i % 4 / 2 * 8, column = i / 4 * 8 + i % 2;
    if (transposed ? x + row - column > 0 : x + row - column < 0) s[i] = -HG_INF;
  }
}
// A tile of outputs, scaled, to (column, row) of a map, through shared memory that the warpgroup owns.
__device__ __forceinline__ void store_tile(const TensorMap *map, int column, int row, char *tile,
                                           const float (&o)[SUMS], float scale0, float scale1) {
  int lane = threadIdx.x % 32, r = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < SUMS / 4; j += 2) {
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float scale = i % 2 ? scale1 : scale0;
      v[i] = pack_bf16(o[4 * j + 2 * i] * scale, o[4 * j + 2 * i + 1] * scale);
    }
    store_matrix(tile + r * 128 + ((j + lane / 16) ^ r % 8) * 16, v[0], v[1], v[2], v[3]);
  }
  fence_async();
  sync_warpgroup(1 + threadIdx.x / 128);
  if (threadIdx.x % 128 == 0) {
    tma_store(map, column, row, tile);
    tma_store_commit();
  }
}
// Waits until what the warpgroup stored has left shared memory.
__device__ __forceinline__ void wait_stored() {
  if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
  sync_warpgroup(1 + threadIdx.x / 128);
}
