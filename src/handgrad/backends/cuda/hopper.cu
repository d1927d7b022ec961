// product: out (M, N) = a (M, K) b (K, N) in bf16 on Hopper's tensor cores (sm_90a), for what cuBLASLt has no epilogue
// product        writes =          out: (M, N) bf16              EXPONENTIALS: e^r, r = product - shift, rounded; 0 in
//                                                                columns from width on
//                writes =          sums: (tiles of N, M) float   EXPONENTIALS: row sums of each tile, before rounding
//                writes = or +=    out: (M, N) grad_t            otherwise: + when the flag or scalars->micro_step is not 0
//                writes =          parts: pieces, row sums of a  otherwise: room, see PIECE
// product_pieces writes = or +=    out, columns: (M) grad_t      tiles that were cut along K; row sums of a
// needs     K >= 512 for EXPONENTIALS, where a tile is written while the next one is multiplied
// layout    -DA_MN, -DB_MN: a lies as (K, M), b as (K, N); otherwise as (M, K) and (N, K). Rows are multiples of 16 bytes;
//           what is past an edge reads as zero and is not written
// numerics  float sums in the order of the tensor cores; pieces of K are added in order
// determinism  fixed order; tiles and pieces depend on the sizes and the number of multiprocessors alone
// speed     H100 80GB, TFLOP/s. At the power limit, 2026-11-26 (cuBLASLt 13.1 and a pass over dy in the same run): weight gradient of
//           3072 x 1024, K=32768 620 (553), 4096 x 1024 675 (560), 4800 x 1600, K=8192 569 (561). Alone, 2026-11-24: head's logits
//           698 (cuBLASLt without the exponentials 767)
// source    own work; the scheme (one warp loads, two warp groups multiply, blocks stay) is that of NVIDIA's CUTLASS
#include "hopper.cuh"
#include "ptx.cuh"
#include "work.cuh"

enum {
  STAGES = 4, A_BYTES = TILE_M / 64 * BOX, B_BYTES = TILE_N / 64 * BOX, STAGE = A_BYTES + B_BYTES,
  ROOM = 2 * BOX,                     // of a warp group, on the way out: two boxes in turn
  THREADS = 384, REGISTERS = TILE_N / 2,
  BARRIERS_AT = STAGES * STAGE + 2 * ROOM
};
#define LOG2E 1.4426950408889634f

__device__ __forceinline__ void put(float *p, float a, float b, bool adds, bool both) {
  if (both && adds) {
    add_pair(p, a, b);
  } else if (both) {
    *(float2 *)p = make_float2(a, b);
  } else {
    *p = a + (adds ? *p : 0.0f);
  }
}
__device__ __forceinline__ void put(bf16 *p, float a, float b, bool adds, bool both) {
  p[0] = from_float<bf16>(a + (adds ? to_float(p[0]) : 0.0f));
  if (both) p[1] = from_float<bf16>(b + (adds ? to_float(p[1]) : 0.0f));
}

// One tile's or piece's sums in registers. `beside(a)` is what else a warp group does while the tensor cores are at
// work on a step, whose part of a lies at `a`.
template <class Beside>
__device__ __forceinline__ void multiply(float *acc, const char *stages, u64 *full, u64 *empty, int group, int steps, int &stage,
                                         int &phase, Beside beside) {
  int last = 0;
  for (int k = 0; k < steps; k++) {
    barrier_wait(full + stage, phase);
    const char *a = stages + stage * STAGE + group * BOX, *b = stages + stage * STAGE + A_BYTES;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; s++)
      Wgmma<TILE_N>::template run<A_MN, B_MN>(acc, operand(a + s * (A_MN ? 2048 : 32), BOX), operand(b + s * (B_MN ? 2048 : 32), BOX), k + s > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0 && threadIdx.x % 128 < CLUSTER) barrier_arrive(empty + last, threadIdx.x % 128);
    beside(a);
    last = stage;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  wgmma_wait<0>();
  if (threadIdx.x % 128 < CLUSTER) barrier_arrive(empty + last, threadIdx.x % 128);
}

#if EXPONENTIALS
// A tile on its way out: its values in bf16, written half a box a step while the next tile is multiplied.
struct Held {
  u32 values[REGISTERS / 2];
  int row, column, tile_n, half;  // first row of the warp group, first column, next half of a box
  float sum0, sum1;
};
enum { HALVES = TILE_N / 32 };
template <int half>
__device__ __forceinline__ void write_half(Held &held, char *room, const TensorMap *out, float *sums, int name, i64 M, i64 N) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, column = held.column + half / 2 * 64;
  char *to = room + half / 2 % 2 * BOX;
  if (half % 2 == 0) {
    if (thread == 0) box_store_read<1>();  // what lay here has left
    sync_group(name);
  }
#pragma unroll
  for (int j = half % 2 * 4; j < half % 2 * 4 + 4; j += 2) {
    u32 *v = held.values + (half / 2 * 8 + j) * 2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float low = exp2_fast(LOG2E * __uint_as_float(v[e] << 16)), high = exp2_fast(LOG2E * __uint_as_float(v[e] & 0xffff0000u));
      (e % 2 ? held.sum1 : held.sum0) += low + high;
      v[e] = pack_bf16(low, high);
    }
    int r = warp * 16 + lane % 16, piece = j + lane / 16;
    store_matrix(to + r * 128 + (piece ^ r % 8) * 16, v[0], v[1], v[2], v[3]);
  }
  if (half % 2) {
    fence_async();
    sync_group(name);
    if (thread == 0) {
      if (held.row < M && column < N) box_store(out, column, held.row, to);
      box_store_commit();
    }
  }
  if (half == HALVES - 1) {
    float sum0 = held.sum0, sum1 = held.sum1;
    sum0 += __shfl_xor_sync(0xffffffffu, sum0, 1);
    sum1 += __shfl_xor_sync(0xffffffffu, sum1, 1);
    sum0 += __shfl_xor_sync(0xffffffffu, sum0, 2);
    sum1 += __shfl_xor_sync(0xffffffffu, sum1, 2);
    i64 row = held.row + warp * 16 + lane / 4;
    if (lane % 4 == 0 && row < M) sums[held.tile_n * M + row] = sum0;
    if (lane % 4 == 0 && row + 8 < M) sums[held.tile_n * M + row + 8] = sum1;
  }
}
__device__ __forceinline__ void write_next(Held &held, char *room, const TensorMap *out, float *sums, int name, i64 M, i64 N) {
#define HALF(h) case h: return write_half<h>(held, room, out, sums, name, M, N);
  switch (held.half++) {
    HALF(0) HALF(1) HALF(2) HALF(3) HALF(4) HALF(5) HALF(6) HALF(7)
  }
#undef HALF
}
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) product_kernel(
    const __grid_constant__ TensorMap a,    // boxes of 64 x 64
    const __grid_constant__ TensorMap b,
    const __grid_constant__ TensorMap out_boxes,
    grad_t *out,         // the same, not EXPONENTIALS
    const float *shift,  // (M)
    float *sums,         // (tiles of N, M)
    float *parts,
    const StepScalars *scalars,
    i64 M, i64 N, i64 K, i64 width, i64 accumulate) {
  HG_SHARED(char, raw);
  char *room = raw + (1024 - shared_address(raw) % 1024) % 1024;
  u64 *full = (u64 *)(room + BARRIERS_AT), *empty = full + STAGES;
  int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
  Work work(M, N, K, gridDim.x / CLUSTER);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 2 * CLUSTER);
    }
    barrier_init_done();
  }
  __syncthreads();
  cluster_sync();

  int tile, k0, k1, slot, m, n, stage = 0, phase = 0;
  if (threadIdx.x < 128) {  // this warp group only loads
    give_registers<40>();
    if (threadIdx.x == 0) {
      for (int i = 0; work.get(i, cluster, tile, k0, k1, slot); i++) {
        work.place(tile, m, n);
        int row = (m * CLUSTER + rank) * TILE_M, column = n * TILE_N;
        for (int k = k0; k < k1; k++) {
          barrier_wait(empty + stage, phase ^ 1);
          barrier_expect(full + stage, STAGE);
          char *to = room + stage * STAGE;
#pragma unroll
          for (int i = 0; i < TILE_M / 64; i++, to += BOX)
            box_load(to, &a, A_MN ? row + 64 * i : k * TILE_K, A_MN ? k * TILE_K : row + 64 * i, full + stage);
#pragma unroll
          for (int i = 0; i < TILE_N / 64 / CLUSTER; i++) {  // each block of the cluster brings its part to both
            int box = rank * (TILE_N / 64 / CLUSTER) + i, at = column + 64 * box;
            box_load(to + box * BOX, &b, B_MN ? at : k * TILE_K, B_MN ? k * TILE_K : at, full + stage, (1 << CLUSTER) - 1);
          }
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    take_registers<232>();
    int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    [[maybe_unused]] int warp = thread / 32, lane = thread % 32;
    char *mine = room + STAGES * STAGE + group * ROOM;
    float acc[REGISTERS];
#if EXPONENTIALS
    Held held;
    held.half = HALVES;
#endif
#if EXPONENTIALS
    int next_m = 0, next_n = 0;
    work.place(cluster, next_m, next_n);
    for (tile = cluster; tile < work.whole; tile += work.clusters) {
      m = next_m, n = next_n;
#else
    for (int i = 0; work.get(i, cluster, tile, k0, k1, slot); i++) {
      work.place(tile, m, n);
#endif
      int first = (m * CLUSTER + rank) * TILE_M + group * 64, column = n * TILE_N, row = first + warp * 16 + lane / 4;
#if EXPONENTIALS
      float shift0 = row < M ? shift[row] : 0.0f, shift1 = row + 8 < M ? shift[row + 8] : 0.0f;
      bool placed = false;
      multiply(acc, room, full, empty, group, work.steps, stage, phase, [&](const char *) {
        if (!placed) work.place(tile + work.clusters, next_m, next_n);  // between two tiles the tensor cores would wait for it
        placed = true;
        if (held.half < HALVES) write_next(held, mine, &out_boxes, sums, 1 + group, M, N);
      });
#pragma unroll
      for (int j = 0; j < TILE_N / 8; j++) {
        float *d = acc + 4 * j;
        d[0] -= shift0, d[1] -= shift0, d[2] -= shift1, d[3] -= shift1;
        if (column + TILE_N > width) {
          int c = column + 8 * j + lane % 4 * 2;
          if (c >= width) d[0] = d[2] = -HG_INF;
          if (c + 1 >= width) d[1] = d[3] = -HG_INF;
        }
        held.values[2 * j] = pack_bf16(d[0], d[1]);
        held.values[2 * j + 1] = pack_bf16(d[2], d[3]);
      }
      held.row = first, held.column = column, held.tile_n = n, held.half = 0, held.sum0 = held.sum1 = 0.0f;
    }
    while (held.half < HALVES) write_next(held, mine, &out_boxes, sums, 1 + group, M, N);
    if (thread == 0) box_store_done();
#else
      bool adds = accumulate || scalars->micro_step;
      float of_rows[8] = {};  // a thread sums 8 rows of a over a sixteenth of k; tiles of a row share the steps
      int turn = (n + work.tiles_n - k0 % work.tiles_n) % work.tiles_n;
      multiply(acc, room, full, empty, group, k1 - k0, stage, phase, [&](const char *a) {
        if (turn-- > 0) return;
        turn = work.tiles_n - 1;
#pragma unroll
        for (int q = 0; q < TILE_K / 16; q++) {
          int k = q * 16 + warp * 4 + lane / 8;
          Pack<u32, 4> v = *(const Pack<u32, 4> *)(a + k * 128 + (lane % 8 ^ k % 8) * 16);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            of_rows[2 * e] += __uint_as_float(v.v[e] << 16);
            of_rows[2 * e + 1] += __uint_as_float(v.v[e] & 0xffff0000u);
          }
        }
        sync_group(1 + group);  // all have read this stage, which one of them gives back
      });
      if (slot >= 0) {
        float *to = parts + (i64)slot * PIECE + (rank * 2 + group) * (64 * TILE_N) + thread * 4;
#pragma unroll
        for (int j = 0; j < REGISTERS / 4; j++) *(float4 *)(to + j * 512) = *(float4 *)(acc + 4 * j);
      } else {
#pragma unroll
        for (int j = 0; j < TILE_N / 8; j++) {
          int c = column + 8 * j + lane % 4 * 2;
          if (row < M && c < N) put(out + row * N + c, acc[4 * j], acc[4 * j + 1], adds, c + 1 < N);
          if (row + 8 < M && c < N) put(out + (row + 8) * N + c, acc[4 * j + 2], acc[4 * j + 3], adds, c + 1 < N);
        }
      }
      float *across = (float *)mine;  // (warps, 64)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        of_rows[e] += __shfl_xor_sync(0xffffffffu, of_rows[e], 8);
        of_rows[e] += __shfl_xor_sync(0xffffffffu, of_rows[e], 16);
        if (lane < 8) across[warp * 64 + lane * 8 + e] = of_rows[e];
      }
      sync_group(1 + group);
      if (thread < 64)
        work.rows(parts, slot < 0 ? tile : work.whole + slot)[rank * TILE_M + group * 64 + thread] =
            across[thread] + across[64 + thread] + across[128 + thread] + across[192 + thread];
      sync_group(1 + group);
    }
#endif
  }
  __syncwarp();
  cluster_sync();  // nobody leaves while a neighbour may still write to it
}

#if !EXPONENTIALS
// Adds up pieces: a block has 16 registers of every thread of one warp group of a tile. Blocks behind those of the tiles
// have 64 rows of a each, and add up their sums over all tiles of the row.
KERNEL __launch_bounds__(128) product_pieces_kernel(
    grad_t *out,         // (M, N)
    grad_t *columns,     // (M)
    const float *parts,
    const StepScalars *scalars,
    i64 M, i64 N, i64 K, i64 clusters, i64 accumulate) {
  Work work(M, N, K, (int)clusters);
  int t = blockIdx.x / 4, part = blockIdx.x % 4, m, n, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  bool adds = accumulate || scalars->micro_step;
  if (t < work.rest) {
    const float *from = parts + part * (64 * TILE_N) + thread * 4 + (i64)blockIdx.y * 4 * 512;
    float4 sum[4] = {};
    work.pieces(t, [&](int slot) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float4 v = *(const float4 *)(from + (i64)slot * PIECE + j * 512);
        sum[j].x += v.x, sum[j].y += v.y, sum[j].z += v.z, sum[j].w += v.w;
      }
    });
    work.place(work.whole + t, m, n);
    i64 row = (i64)m * CLUSTER * TILE_M + part * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      i64 c = (i64)n * TILE_N + 8 * (blockIdx.y * 4 + j) + lane % 4 * 2;
      if (row < M && c < N) put(out + row * N + c, sum[j].x, sum[j].y, adds, c + 1 < N);
      if (row + 8 < M && c < N) put(out + (row + 8) * N + c, sum[j].z, sum[j].w, adds, c + 1 < N);
    }
    return;
  }
  m = t - work.rest;
  i64 row = (i64)m * CLUSTER * TILE_M + part * 64 + thread;
  if (blockIdx.y > 0 || thread >= 64 || row >= M) return;
  float total = 0.0f;
  for (int tile = m * work.tiles_n; tile < (m + 1) * work.tiles_n; tile++) {
    if (tile < work.whole) total += work.rows(parts, tile)[part * 64 + thread];
    else work.pieces(tile - work.whole, [&](int slot) { total += work.rows(parts, work.whole + slot)[part * 64 + thread]; });
  }
  columns[row] = from_float<grad_t>(total + (adds ? to_float(columns[row]) : 0.0f));
}
#endif
