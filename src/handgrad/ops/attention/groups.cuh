// The engine of attention on Hopper: who owns which rows when, tiles that stream through shared memory, products whose left
// factor stays in registers. hopper_forward.cu and hopper_backward.cu are written with it.       math: README.md §2, §3, §7
//
// needs     D = 64, T % 128 == 0, no dropout
// layout    a block has two warp groups that multiply, 64 rows each, and one thread that loads. It stays, and takes one
//           stretch of 128 rows after another; what the next one needs is on its way while this one is computed
// numerics  bf16 factors, f32 sums
// source    own work, after Dao 2023 (FlashAttention-2) and Shah et al. 2024 (FlashAttention-3)
//
// Defines: CAUSAL, TOGETHER (heads whose stretches are taken side by side).
#pragma once
#include "ptx_sm90a.cuh"
#include "ptx.cuh"

enum {
  TILE = 64, D = 64,                  // rows of a tile, elements of a row
  BOX = TILE * D * 2,                 // bytes of a tile: rows of 128 bytes, swizzled
  STEPS = D / 16,                     // of a product over D, or over the rows of a tile
  SUMS = TILE * D / 128,              // of a thread, for a tile of scores or of outputs
  GROUPS = 2, ROWS = GROUPS * TILE,   // warp groups that multiply; rows of a block
  THREADS = 128 * (GROUPS + 1)
};
#define LOG2E 1.4426950408889634f

// The number of a thread's warp group, the same for a whole warp as the compiler sees it: what depends on it does not diverge.
__device__ __forceinline__ int warp_group() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// Which rows of which head a block takes in a round. Heads come TOGETHER at a time, so that what they stream stays in L2,
// and among them stretches with most tiles first. Every other round goes backwards: no block has the longest each time.
struct Place { int level, head; };  // level 0 is the longest
__device__ __forceinline__ bool place(Place &at, int round, int levels, int heads) {
  int i = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  int first = i / (TOGETHER * levels) * TOGETHER, within = i % (TOGETHER * levels);
  int size = min(TOGETHER, heads - first);
  at = {within / max(size, 1), first + within % max(size, 1)};
  return i < levels * heads;
}

// Tiles in flight: a stage is filled when its bytes have come, and free when both warp groups have arrived.
template <int stages> struct Ring {
  u64 *full, *empty;
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void init() const {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 4 * GROUPS);
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
// Warp groups take turns at the tensor cores: else both would ask for all their products at once, wait for all of them,
// and leave the tensor cores idle while both compute exponentials. Both take the same number of turns.
__device__ __forceinline__ void take_turn(int group) { sync_warpgroups(3 + group); }
__device__ __forceinline__ void pass_turn(int group) { arrive_warpgroups(4 - group); }

// A warp is done with a stage.
__device__ __forceinline__ void leave(u64 *empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// f = a warp's 16 rows of a tile, as the left factor of a product over D
__device__ __forceinline__ void load_left(u32 (&f)[STEPS][4], const char *box) {
  int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < STEPS; k++) load_matrix(f[k], box + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16);
}
// s = a b', over D; b is described by `operand`, whose low bits count 16 bytes
__device__ __forceinline__ void scores(float (&s)[SUMS], const u32 (&a)[STEPS][4], u64 b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) wgmma_registers<0>(s, a[k], b + k * (32 >> 4), k > 0);
}
// o += p b, over the rows of b
__device__ __forceinline__ void mix(float (&o)[SUMS], const u32 (&p)[STEPS][4], u64 b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) wgmma_registers<1>(o, p[k], b + k * (2048 >> 4), 1);
}
// Scores as the left factor of the next product: sums lie in registers just as left factors do.
__device__ __forceinline__ void factors(u32 (&p)[STEPS][4], const float (&s)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS / 2; i++) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}
__device__ __forceinline__ void clear(float (&o)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) o[i] = 0.0f;
  wgmma_settle(o);
}
// Of a tile on the diagonal, scores become -inf where the key comes after the query; with `turned`, rows are keys.
template <bool turned> __device__ __forceinline__ void hide(float (&s)[SUMS]) {
  int lane = threadIdx.x % 32, x = threadIdx.x % 128 / 32 * 16 + lane / 4 - lane % 4 * 2;  // the first row less the first column
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    const int row = i % 4 / 2 * 8, column = i / 4 * 8 + i % 2;
    if (turned ? x + row - column > 0 : x + row - column < 0) s[i] = -HG_INF;
  }
}
// A tile of outputs, scaled, to its place at (column, row) of a map, through shared memory that the warp group owns.
__device__ __forceinline__ void store_tile(const TensorMap *map, int column, int row, char *box, const float (&o)[SUMS],
                                           float scale0, float scale1) {
  int lane = threadIdx.x % 32, r = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < SUMS / 4; j += 2) {
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float scale = i % 2 ? scale1 : scale0;
      v[i] = pack_bf16(o[4 * j + 2 * i] * scale, o[4 * j + 2 * i + 1] * scale);
    }
    store_matrix(box + r * 128 + ((j + lane / 16) ^ r % 8) * 16, v[0], v[1], v[2], v[3]);
  }
  fence_async();
  sync_warpgroup(1 + threadIdx.x / 128);
  if (threadIdx.x % 128 == 0) {
    tma_store(map, column, row, box);
    tma_store_commit();
  }
}
// Waits until what the warp group stored has left shared memory.
__device__ __forceinline__ void wait_stored() {
  if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
  sync_warpgroup(1 + threadIdx.x / 128);
}
