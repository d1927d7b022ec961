// lm_loss: the exp GEMM on Hopper (sm_90a): logits that leave as exponentials                      math: README.md §8
// exp_gemm  writes =          p: (M, N) bf16 = e^r, r = x w' - shift, rounded; 0 in columns from width on
//           writes =          sums: (tiles of N, M) float = row sums of each tile of p, before rounding
// needs     K >= 512: a tile is written in 8 steps while the next one is multiplied
// numerics  float accumulators in the tensor cores' order; r is rounded to bf16; exponentials in base 2 to 2 ULP
// layout    see wgmma_gemm.cuh; x (M, K) and w (N, K); rows are multiples of 16 bytes; past an edge TMA reads zeros and
//           writes nothing
// determinism  fixed order
// speed     H100 80GB, 2026-11-24, alone: 698 TFLOP/s (cuBLASLt without the exponentials 767)
// source    own work; the scheme (one warp loads, two warpgroups multiply, blocks are persistent) is CUTLASS's
#include "kernel.cuh"
#include "exp_tiles.cuh"
#include "wgmma_gemm.cuh"

#define LOG2E 1.4426950408889634f

// A tile on its way out: rounded r in registers. A step of the next tile writes half a TMA tile of it.
struct PendingTile {
  u32 values[ACCUMULATORS / 2];
  int row, column, tile_n, half;  // first row of the warpgroup, first column, next half
  float sum0, sum1;               // of a thread's two rows
};
enum { HALVES = TILE_N / 32 };

// Exponentials of 32 columns of the tile, to shared memory.
template <int half> __device__ __forceinline__ void exponentiate(PendingTile &tile, char *to) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int j = half % 2 * 4; j < half % 2 * 4 + 4; j += 2) {
    u32 *v = tile.values + (half / 2 * 8 + j) * 2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float low = exp2_fast(LOG2E * __uint_as_float(v[e] << 16));
      float high = exp2_fast(LOG2E * __uint_as_float(v[e] & 0xffff0000u));
      (e % 2 ? tile.sum1 : tile.sum0) += low + high;
      v[e] = pack_bf16(low, high);
    }
    int r = warp * 16 + lane % 16, word = j + lane / 16;
    store_matrix(to + r * 128 + (word ^ r % 8) * 16, v[0], v[1], v[2], v[3]);
  }
}

__device__ __forceinline__ void store_sums(const PendingTile &tile, float *sums, i64 M) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float sum0 = tile.sum0, sum1 = tile.sum1;
  sum0 += __shfl_xor_sync(0xffffffffu, sum0, 1);
  sum1 += __shfl_xor_sync(0xffffffffu, sum1, 1);
  sum0 += __shfl_xor_sync(0xffffffffu, sum0, 2);
  sum1 += __shfl_xor_sync(0xffffffffu, sum1, 2);
  i64 row = tile.row + warp * 16 + lane / 4;
  if (lane % 4 == 0 && row < M) sums[tile.tile_n * M + row] = sum0;
  if (lane % 4 == 0 && row + 8 < M) sums[tile.tile_n * M + row + 8] = sum1;
}

// Half a TMA tile (64 rows, 32 columns); the second half of each goes out by TMA.
template <int half>
__device__ __forceinline__ void write_half(PendingTile &tile, char *buffer, const TensorMap *p, float *sums,
                                           int barrier, i64 M, i64 N) {
  int thread = threadIdx.x % 128, column = tile.column + half / 2 * 64;
  char *to = buffer + half / 2 % 2 * TMA_TILE_BYTES;
  if (half % 2 == 0) {
    if (thread == 0) tma_store_wait_read<1>();  // the TMA tile that was here has left
    sync_warpgroup(barrier);
  }
  exponentiate<half>(tile, to);
  if (half % 2) {
    fence_async();
    sync_warpgroup(barrier);
    if (thread == 0) {
      if (tile.row < M && column < N) tma_store(p, column, tile.row, to);
      tma_store_commit();
    }
  }
  if (half == HALVES - 1) store_sums(tile, sums, M);
}

__device__ __forceinline__ void write_next(PendingTile &tile, char *buffer, const TensorMap *p, float *sums,
                                           int barrier, i64 M, i64 N) {
  static_assert(HALVES == 8, "a case for each half");
  switch (tile.half++) {
    case 0: return write_half<0>(tile, buffer, p, sums, barrier, M, N);
    case 1: return write_half<1>(tile, buffer, p, sums, barrier, M, N);
    case 2: return write_half<2>(tile, buffer, p, sums, barrier, M, N);
    case 3: return write_half<3>(tile, buffer, p, sums, barrier, M, N);
    case 4: return write_half<4>(tile, buffer, p, sums, barrier, M, N);
    case 5: return write_half<5>(tile, buffer, p, sums, barrier, M, N);
    case 6: return write_half<6>(tile, buffer, p, sums, barrier, M, N);
    case 7: return write_half<7>(tile, buffer, p, sums, barrier, M, N);
  }
}

// Accumulators minus the shift of their row, rounded; -inf in columns from width on, of which e^r is 0.
__device__ __forceinline__ void hold(PendingTile &tile, float *acc, float shift0, float shift1, int column, i64 width) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < TILE_N / 8; j++) {
    float *d = acc + 4 * j;
    d[0] -= shift0;
    d[1] -= shift0;
    d[2] -= shift1;
    d[3] -= shift1;
    if (column + TILE_N > width) {
      int c = column + 8 * j + lane % 4 * 2;
      if (c >= width) d[0] = d[2] = -HG_INF;
      if (c + 1 >= width) d[1] = d[3] = -HG_INF;
    }
    tile.values[2 * j] = pack_bf16(d[0], d[1]);
    tile.values[2 * j + 1] = pack_bf16(d[2], d[3]);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) lm_loss_exp_gemm_kernel(
    const __grid_constant__ TensorMap x,  // (M, K)
    const __grid_constant__ TensorMap w,  // (N, K)
    const __grid_constant__ TensorMap p,  // (M, N)
    const float *shift,                   // (M)
    float *sums,                          // (tiles of N, M)
    i64 M, i64 N, i64 K, i64 width) {
  HG_SHARED(char, raw);
  Pipeline pipe(align_shared(raw));
  const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
  const ExpTiles tiles(M, N, K, gridDim.x / CLUSTER);
  pipe.init();

  if (threadIdx.x < 128) {  // this warpgroup only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) load_tiles(pipe, tiles, &x, &w, rank);
  } else {
    setmaxnreg_inc<232>();
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    char *buffer = pipe.stages + OUTPUTS_AT + group * OUTPUT_BYTES;
    float acc[ACCUMULATORS];
    PendingTile pending;
    pending.half = HALVES;
    int m, n, next_m = 0, next_n = 0;
    tiles.coordinates(cluster, next_m, next_n);
    for (int tile = cluster; tile < tiles.tiles; tile += tiles.clusters) {
      m = next_m;
      n = next_n;
      const int first = (m * CLUSTER + rank) * TILE_M + group * 64, column = n * TILE_N;
      const int row = first + warp * 16 + lane / 4;
      const float shift0 = row < M ? shift[row] : 0.0f, shift1 = row + 8 < M ? shift[row + 8] : 0.0f;
      bool located = false;  // the next tile: here, because between tiles the tensor cores would idle
      multiply(acc, pipe, group, tiles.steps, [&](const char *) {
        if (!located) tiles.coordinates(tile + tiles.clusters, next_m, next_n);
        located = true;
        if (pending.half < HALVES) write_next(pending, buffer, &p, sums, 1 + group, M, N);
      });
      hold(pending, acc, shift0, shift1, column, width);
      pending.row = first;
      pending.column = column;
      pending.tile_n = n;
      pending.half = 0;
      pending.sum0 = pending.sum1 = 0.0f;
    }
    while (pending.half < HALVES) write_next(pending, buffer, &p, sums, 1 + group, M, N);
    if (thread == 0) tma_store_wait();
  }
  __syncwarp();
  cluster_sync();  // no block leaves while another of its cluster may still write to its shared memory
}
