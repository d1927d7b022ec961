// linear: the kernels around the library's GEMMs                                              math: README.md §2, §3
// bias          writes +=         y: (N, M) dtype                y += b; only if rows are not a multiple of 16 bytes
// gelu          writes =          y: (N, M) dtype                y = gelu(pre), may be pre itself
// gelu_backward writes =          dpre: (N, M) dtype             dpre = dy gelu'(pre), may be dy itself
// db_partial    writes =          partial: (parts, M) float      sums of dy over ranges of rows
// db            writes = or +=    db: (M) grad_t                 + where accumulate says so
// numerics  float inside, rounded once; GELU as x sigmoid(2u), in bf16 with the hardware's e^x and division
// layout    16-byte accesses (-DVEC elements); 2 to 8 of them in flight per thread
// determinism  fixed order: rows of a range by 8 warps, warps in order, then ranges (-DPARTS of them)
// speed     H100 80GB, in a traced step, 2026-11-24: dw and db together 384 to 605 TFLOP/s at K=768 (N=65536); these
//           kernels alone are not measured yet
// source    own work
#include "ptx.cuh"

// -DVEC      elements of one access
// -DPARTS    ranges of rows of which db is the sum
// -DTHREADS  of a block; -DSUM_THREADS: of a block of linear_db_kernel
// -DGELU_PACKS, -DGELU_BACKWARD_PACKS  accesses of a thread in gelu, gelu_backward; pack i is THREADS after pack i - 1
#if !defined(VEC) || !defined(PARTS) || !defined(THREADS) || !defined(SUM_THREADS)
#error "linear/op.py defines these"
#endif
#if !defined(GELU_PACKS) || !defined(GELU_BACKWARD_PACKS)
#error "linear/op.py defines these"
#endif

enum { WARPS = THREADS / 32 };

// With 1/2 (1 + tanh(u)) = sigmoid(2u), GELU costs one exponential and one division. For bf16 both come from the
// hardware, 2^-20 off at most. The bound keeps the exponential finite; a NaN comes back through x.
__device__ __forceinline__ float sigmoid_2u(float x) {
#if HG_BF16
  float z = fminf(x * (-2.3022082f - 0.10294324f * x * x), 120.0f);  // -2u log2(e), u = sqrt(2/pi) (x + 0.044715 x^3)
  return __fdividef(1.0f, 1.0f + exp2_fast(z));
#else
  return 1.0f / (1.0f + expf(fminf(x * (-1.5957691f - 0.07135482f * x * x), 80.0f)));
#endif
}
__device__ __forceinline__ float gelu_of(float x) { return x * sigmoid_2u(x); }
__device__ __forceinline__ float gelu_grad(float x) {
  float s = sigmoid_2u(x);
  return s + x * s * (1.0f - s) * (1.5957691216057308f + 0.21406445f * x * x);
}

KERNEL __launch_bounds__(THREADS) linear_bias_kernel(
    real *y,        // (N, M)
    const real *b,  // (M)
    i64 N, i64 M) {
  for (i64 n = blockIdx.x; n < N; n += gridDim.x) {
    real *row = y + n * M;
    for (i64 m = threadIdx.x; m < M; m += THREADS) row[m] = from_float<real>(to_float(row[m]) + to_float(b[m]));
  }
}

KERNEL __launch_bounds__(THREADS) linear_gelu_kernel(
    real *y,          // (N, M)
    const real *pre,  // (N, M)
    i64 N, i64 M) {
  i64 packs = N * M / VEC, first = (i64)blockIdx.x * (THREADS * GELU_PACKS) + threadIdx.x;
  Pack<real, VEC> x[GELU_PACKS];
#pragma unroll
  for (int i = 0; i < GELU_PACKS; i++)
    if (first + i * THREADS < packs) x[i] = load_streaming<real, VEC>(pre + (first + i * THREADS) * VEC);
#pragma unroll
  for (int i = 0; i < GELU_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
#pragma unroll
    for (int q = 0; q < VEC; q++) x[i].set(q, gelu_of(x[i].at(q)));
    store(y + (first + i * THREADS) * VEC, x[i]);
  }
}

KERNEL __launch_bounds__(THREADS) linear_gelu_backward_kernel(
    real *dpre,       // (N, M)
    const real *dy,   // (N, M)
    const real *pre,  // (N, M)
    i64 N, i64 M) {
  i64 packs = N * M / VEC, first = (i64)blockIdx.x * (THREADS * GELU_BACKWARD_PACKS) + threadIdx.x;
  Pack<real, VEC> d[GELU_BACKWARD_PACKS], x[GELU_BACKWARD_PACKS];
#pragma unroll
  for (int i = 0; i < GELU_BACKWARD_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
    d[i] = load_streaming<real, VEC>(dy + (first + i * THREADS) * VEC);
    x[i] = load_streaming<real, VEC>(pre + (first + i * THREADS) * VEC);
  }
#pragma unroll
  for (int i = 0; i < GELU_BACKWARD_PACKS; i++) {
    if (first + i * THREADS >= packs) break;
#pragma unroll
    for (int q = 0; q < VEC; q++) d[i].set(q, d[i].at(q) * gelu_grad(x[i].at(q)));
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
