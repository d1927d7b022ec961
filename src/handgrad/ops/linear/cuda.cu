// linear: the kernels around the library's GEMMs                                              math: README.md §2, §3
// bias          writes +=         y: (N, M) dtype                y += b; only if rows are not a multiple of 16 bytes
// act           writes =          y: (N, M) dtype                y = act(pre), may be pre itself
// act_backward  writes =          dpre: (N, M) dtype             dpre = dy act'(pre), may be dy itself
// db_partial    writes =          partial: (parts, M) float      sums of dy over ranges of rows
// db            writes = or +=    db: (M) grad_t                 + where accumulate says so
// numerics  float inside, rounded once; in bf16 activations use the hardware's e^x and division (activation.cuh)
// layout    16-byte accesses (-DVEC elements); 2 to 8 of them in flight per thread
// determinism  fixed order: rows of a range by 8 warps, warps in order, then ranges (-DPARTS of them)
// speed     H100 80GB, in a traced step, 2026-11-24: dw and db together 384 to 605 TFLOP/s at K=768 (N=65536); these
//           kernels alone are not measured yet
// source    own work
#include "activation.cuh"

// -DVEC      elements of one access
// -DPARTS    ranges of rows of which db is the sum
// -DTHREADS  of a block; -DSUM_THREADS: of a block of linear_db_kernel
// -DACT      the activation, a number of activation.cuh
// -DACT_PACKS, -DACT_BACKWARD_PACKS  accesses of a thread in act, act_backward; pack i is THREADS after pack i - 1
#if !defined(VEC) || !defined(PARTS) || !defined(THREADS) || !defined(SUM_THREADS)
#error "linear/op.py defines these"
#endif
#if !defined(ACT_PACKS) || !defined(ACT_BACKWARD_PACKS)
#error "linear/op.py defines these"
#endif

enum { WARPS = THREADS / 32 };

KERNEL __launch_bounds__(THREADS) linear_bias_kernel(
    real *y,        // (N, M)
    const real *b,  // (M)
    i64 N, i64 M) {
  for (i64 n = blockIdx.x; n < N; n += gridDim.x) {
    real *row = y + n * M;
    for (i64 m = threadIdx.x; m < M; m += THREADS) row[m] = from_float<real>(to_float(row[m]) + to_float(b[m]));
  }
}

KERNEL __launch_bounds__(THREADS) linear_act_kernel(
    real *y,          // (N, M)
    const real *pre,  // (N, M)
    i64 N, i64 M) {
  i64 packs = N * M / VEC, first = (i64)blockIdx.x * (THREADS * ACT_PACKS) + threadIdx.x;
  Pack<real, VEC> x[ACT_PACKS];
#pragma unroll
  for (int i = 0; i < ACT_PACKS; i++)
    if (first + i * THREADS < packs) x[i] = load_streaming<real, VEC>(pre + (first + i * THREADS) * VEC);
#pragma unroll
  for (int i = 0; i < ACT_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
#pragma unroll
    for (int q = 0; q < VEC; q++) x[i].set(q, act_of(x[i].at(q)));
    store(y + (first + i * THREADS) * VEC, x[i]);
  }
}

KERNEL __launch_bounds__(THREADS) linear_act_backward_kernel(
    real *dpre,       // (N, M)
    const real *dy,   // (N, M)
    const real *pre,  // (N, M)
    i64 N, i64 M) {
  i64 packs = N * M / VEC, first = (i64)blockIdx.x * (THREADS * ACT_BACKWARD_PACKS) + threadIdx.x;
  Pack<real, VEC> d[ACT_BACKWARD_PACKS], x[ACT_BACKWARD_PACKS];
#pragma unroll
  for (int i = 0; i < ACT_BACKWARD_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
    d[i] = load_streaming<real, VEC>(dy + (first + i * THREADS) * VEC);
    x[i] = load_streaming<real, VEC>(pre + (first + i * THREADS) * VEC);
  }
#pragma unroll
  for (int i = 0; i < ACT_BACKWARD_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
#pragma unroll
    for (int q = 0; q < VEC; q++) d[i].set(q, d[i].at(q) * act_grad(x[i].at(q)));
    store(dpre + (first + i * THREADS) * VEC, d[i]);
  }
}

// One range of rows (blockIdx.y of gridDim.y) of 32 packs of columns. A warp reads a pack per lane, 512 bytes of a row.
// The 8 warps take rows in turn, and each has 8 rows in flight.
KERNEL __launch_bounds__(THREADS, 4) linear_db_partial_kernel(
    float *partial,  // (parts, M)
    const real *dy,  // (N, M)
    i64 N, i64 M) {
  enum { FLIGHT = 8, ROW = VEC * 33 };
  __shared__ float sums[WARPS * ROW];  // (warp, element of a pack, lane); 33 avoids bank conflicts on both sides
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  i64 column = ((i64)blockIdx.x * 32 + lane) * VEC;
  i64 rows = (N + gridDim.y - 1) / gridDim.y, end = (blockIdx.y + 1) * rows < N ? (blockIdx.y + 1) * rows : N;
  float sum[VEC] = {0.0f};
  if (column < M) {
    for (i64 n = blockIdx.y * rows + warp; n < end; n += FLIGHT * WARPS) {
      Pack<real, VEC> x[FLIGHT] = {};
#pragma unroll
      for (int i = 0; i < FLIGHT; i++)
        if (n + i * WARPS < end) x[i] = load<real, VEC>(dy + (n + i * WARPS) * M + column);
#pragma unroll
      for (int i = 0; i < FLIGHT; i++)
#pragma unroll
        for (int q = 0; q < VEC; q++) sum[q] += x[i].at(q);
    }
  }
#pragma unroll
  for (int q = 0; q < VEC; q++) sums[warp * ROW + q * 33 + lane] = sum[q];
  __syncthreads();
  int c = threadIdx.x;  // a column of the 32 packs
  if (c < 32 * VEC && (i64)blockIdx.x * (32 * VEC) + c < M) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[w * ROW + c % VEC * 33 + c / VEC];
    partial[blockIdx.y * M + (i64)blockIdx.x * (32 * VEC) + c] = total;
  }
}

// 32 columns. The 32 warps take partial sums in turn, and each has all of its own in flight.
KERNEL __launch_bounds__(SUM_THREADS) linear_db_kernel(
    grad_t *db,            // (M)
    const float *partial,  // (PARTS, M)
    i64 M, i64 accumulate) {
  __shared__ float sums[SUM_THREADS];  // (warp, column)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  i64 column = (i64)blockIdx.x * 32 + lane;
  float sum = 0.0f;
#pragma unroll 8
  for (int p = warp; p < PARTS; p += SUM_THREADS / 32)
    if (column < M) sum += partial[p * M + column];
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= M) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < SUM_THREADS / 32; w++) total += sums[w * 32 + lane];
  if (accumulate) total += to_float(db[column]);
  db[column] = from_float<grad_t>(total);
}
