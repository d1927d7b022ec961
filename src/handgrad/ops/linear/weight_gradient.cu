// linear: the weight gradient with the bias gradient on Hopper (sm_90a), split along K            math: README.md §3
// gemm      writes = or +=    dw: (M, N) grad_t = dy' x    whole tiles; + where accumulate says so
//           writes =          partials: sums of split tiles over a range of K; row sums of dy' (split_k.cuh)
// reduce    writes = or +=    dw: (M, N) grad_t                  split tiles
//           writes = or +=    db: (M) grad_t                     row sums of dy'
// numerics  float accumulators in the tensor cores' order; partials are added in order
// sizes     M, N: of dw (the op's M, K); K: rows of dy (the op's N)
// layout    see wgmma_gemm.cuh; dy (K, M) and x (K, N); rows are multiples of 16 bytes; past an edge TMA reads zeros
// determinism  fixed order; tiles and partials depend on the sizes and the number of SMs alone
// speed     H100 80GB, 2026-11-26, at the power limit, TFLOP/s (in brackets cuBLASLt 13.1 and a pass over dy, same
//           run): 3072 x 1024, K=32768 620 (553), 4096 x 1024 675 (560), 4800 x 1600, K=8192 569 (561)
// source    own work; the scheme (one warp loads, two warpgroups multiply, blocks are persistent) is CUTLASS's
#include "kernel.cuh"
#include "split_k.cuh"
#include "wgmma_gemm.cuh"

// p[0] = or += x and, if `both`, p[1] = or += y.
__device__ __forceinline__ void store_pair(float *p, float x, float y, bool accumulate, bool both) {
  if (both && accumulate) {
    add_pair(p, x, y);
  } else if (both) {
    *(float2 *)p = make_float2(x, y);
  } else {
    *p = x + (accumulate ? *p : 0.0f);
  }
}
__device__ __forceinline__ void store_pair(bf16 *p, float x, float y, bool accumulate, bool both) {
  p[0] = from_float<bf16>(x + (accumulate ? to_float(p[0]) : 0.0f));
  if (both) p[1] = from_float<bf16>(y + (accumulate ? to_float(p[1]) : 0.0f));
}

// Adds a step's rows of dy' to a thread's sums: 8 rows, a sixteenth of the step's k each.
__device__ __forceinline__ void add_rows(float (&rows)[8], const char *a) {
  int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < TILE_K / 16; q++) {
    int k = q * 16 + warp * 4 + lane / 8;
    Pack<u32, 4> v = *(const Pack<u32, 4> *)(a + k * 128 + (lane % 8 ^ k % 8) * 16);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      rows[2 * e] += __uint_as_float(v.v[e] << 16);
      rows[2 * e + 1] += __uint_as_float(v.v[e] & 0xffff0000u);
    }
  }
}

// The row sums of a warpgroup's 64 rows, from those of its threads, through shared memory.
__device__ __forceinline__ void store_row_sums(float *to, float (&rows)[8], float *buffer, int barrier) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;  // buffer: (warps, 64)
#pragma unroll
  for (int e = 0; e < 8; e++) {
    rows[e] += __shfl_xor_sync(0xffffffffu, rows[e], 8);
    rows[e] += __shfl_xor_sync(0xffffffffu, rows[e], 16);
    if (lane < 8) buffer[warp * 64 + lane * 8 + e] = rows[e];
  }
  sync_warpgroup(barrier);
  if (thread < 64) to[thread] = buffer[thread] + buffer[64 + thread] + buffer[128 + thread] + buffer[192 + thread];
  sync_warpgroup(barrier);
}

// A warpgroup's accumulators, as its 64 rows of a split-K partial.
__device__ __forceinline__ void store_partial(float *to, const float *acc) {
#pragma unroll
  for (int j = 0; j < ACCUMULATORS / 4; j++) *(float4 *)(to + j * 512) = *(float4 *)(acc + 4 * j);
}

// A warpgroup's accumulators, to their place in dw; (row, column): of the thread's first one, of the tile.
__device__ __forceinline__ void store_tile(grad_t *dw, const float *acc, int row, int column, i64 M, i64 N,
                                           bool accumulate) {
#pragma unroll
  for (int j = 0; j < TILE_N / 8; j++) {
    int c = column + 8 * j + threadIdx.x % 4 * 2;
    if (row < M && c < N) store_pair(dw + row * N + c, acc[4 * j], acc[4 * j + 1], accumulate, c + 1 < N);
    if (row + 8 < M && c < N) store_pair(dw + (row + 8) * N + c, acc[4 * j + 2], acc[4 * j + 3], accumulate, c + 1 < N);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) linear_weight_gradient_kernel(
    const __grid_constant__ TensorMap dy,  // (K, M)
    const __grid_constant__ TensorMap x,   // (K, N)
    grad_t *dw,                            // (M, N)
    float *partials,
    i64 M, i64 N, i64 K, i64 split, i64 accumulate) {
  HG_SHARED(char, raw);
  Pipeline pipe(align_shared(raw));
  const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
  const SplitK work(M, N, K, gridDim.x / CLUSTER, (int)split);
  pipe.init();

  if (threadIdx.x < 128) {  // this warpgroup only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) load_tiles(pipe, work, &dy, &x, rank);
  } else {
    setmaxnreg_inc<232>();
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    float *buffer = (float *)(pipe.stages + OUTPUTS_AT + group * OUTPUT_BYTES);
    float acc[ACCUMULATORS];
    TileSteps at;
    int m, n;
    for (int i = 0; work.get(i, cluster, at); i++) {
      work.coordinates(at.tile, m, n);
      const int row = (m * CLUSTER + rank) * TILE_M + group * 64 + warp * 16 + lane / 4, column = n * TILE_N;
      float rows[8] = {};
      // the tiles of a row share the steps
      int steps_to_skip = (n + work.tiles_n - at.k0 % work.tiles_n) % work.tiles_n;
      multiply(acc, pipe, group, at.k1 - at.k0, [&](const char *a) {
        if (steps_to_skip-- > 0) return;
        steps_to_skip = work.tiles_n - 1;
        add_rows(rows, a);
        sync_warpgroup(1 + group);  // all threads have read this stage before one of them releases it
      });
      if (at.partial >= 0) {
        const int part = rank * WARPGROUPS + group;
        store_partial(partials + (i64)at.partial * PARTIAL + part * (64 * TILE_N) + thread * 4, acc);
      } else {
        store_tile(dw, acc, row, column, M, N, accumulate);
      }
      float *sums = work.row_sums(partials, at.partial < 0 ? at.tile : work.whole + at.partial);
      store_row_sums(sums + rank * TILE_M + group * 64, rows, buffer, 1 + group);
    }
  }
  __syncwarp();
  cluster_sync();  // no block leaves while another of its cluster may still write to its shared memory
}

// Adds up partials: a block has 16 accumulators of every thread of one warpgroup of a split tile.
__device__ __forceinline__ void reduce_tile(grad_t *dw, const float *partials, const SplitK &work, int t, int part,
                                            i64 M, i64 N, bool accumulate) {
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, m, n;
  const float *from = partials + part * (64 * TILE_N) + thread * 4 + (i64)blockIdx.y * 4 * 512;
  float4 sum[4] = {};
  work.for_each_partial(t, [&](int partial) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float4 v = *(const float4 *)(from + (i64)partial * PARTIAL + j * 512);
      sum[j].x += v.x;
      sum[j].y += v.y;
      sum[j].z += v.z;
      sum[j].w += v.w;
    }
  });
  work.coordinates(work.whole + t, m, n);
  i64 row = (i64)m * CLUSTER_M + part * 64 + warp * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    i64 c = (i64)n * TILE_N + 8 * (blockIdx.y * 4 + j) + lane % 4 * 2;
    if (row < M && c < N) store_pair(dw + row * N + c, sum[j].x, sum[j].y, accumulate, c + 1 < N);
    if (row + 8 < M && c < N) store_pair(dw + (row + 8) * N + c, sum[j].z, sum[j].w, accumulate, c + 1 < N);
  }
}

// db of 64 rows: their row sums over all tiles of a row m, whole ones and partials.
__device__ __forceinline__ void reduce_rows(grad_t *db, const float *partials, const SplitK &work, int m, int part,
                                            i64 M, bool accumulate) {
  i64 row = (i64)m * CLUSTER_M + part * 64 + threadIdx.x;
  if (blockIdx.y > 0 || threadIdx.x >= 64 || row >= M) return;
  int at = part * 64 + threadIdx.x;
  float total = 0.0f;
  for (int tile = m * work.tiles_n; tile < (m + 1) * work.tiles_n; tile++) {
    if (tile < work.whole) {
      total += work.row_sums(partials, tile)[at];
    } else {
      work.for_each_partial(tile - work.whole, [&](int i) { total += work.row_sums(partials, work.whole + i)[at]; });
    }
  }
  db[row] = from_float<grad_t>(total + (accumulate ? to_float(db[row]) : 0.0f));
}

// Blocks: 4 for each split tile, then 4 for each row of tiles.
KERNEL __launch_bounds__(REDUCE_THREADS) linear_weight_gradient_reduce_kernel(
    grad_t *dw,  // (M, N)
    grad_t *db,  // (M)
    const float *partials,
    i64 M, i64 N, i64 K, i64 clusters, i64 split, i64 accumulate_dw, i64 accumulate_db) {
  const SplitK work(M, N, K, (int)clusters, (int)split);
  const int t = blockIdx.x / 4, part = blockIdx.x % 4;
  if (t < work.split) {
    reduce_tile(dw, partials, work, t, part, M, N, accumulate_dw);
  } else {
    reduce_rows(db, partials, work, t - work.split, part, M, accumulate_db);
  }
}
