// lora: y = base, and in every span of columns + scale u w^T                               math: README.md §2, §3
// forward   writes =  y: (N, M) dtype
// backward  writes =  du: (N, U) dtype;  = or += dw: (W, R) grad_t
// numerics  sums in f32, rounded once; scale is applied to f32 values
// layout    y: a thread owns a column of ROWS rows; du: a block owns DU_ROWS rows, and GROUP threads share a row of w;
//           dw: a block sums 32 rows of w over a range of rows of dy
// determinism  fixed order: rows of a range, then ranges (lora_dw_kernel); no atomics
// speed     not measured yet
// source    own work
#include "kernel.cuh"

// -DCOLUMNS, -DU_COLUMNS, -DW_ROWS, -DRANK  M, U, W, R
// -DAT0, -DN0, ... -DN2                     the spans
// -DSCALE                                   the factor of u w^T
// -DTHREADS  of a block;  -DROWS, -DDU_ROWS, -DDW_ROWS  rows that a block takes at a time
// -DGROUP    a power of two, at most 64: threads of lora_du_kernel that share a row of w
#if !defined(COLUMNS) || !defined(U_COLUMNS) || !defined(W_ROWS) || !defined(RANK) || !defined(AT0) || !defined(N2)
#error "lora/op.py defines these"
#endif
#if !defined(THREADS) || !defined(ROWS) || !defined(DU_ROWS) || !defined(DW_ROWS) || !defined(GROUP) || !defined(SCALE)
#error "lora/op.py defines these"
#endif

constexpr int M = COLUMNS, U = U_COLUMNS, W = W_ROWS, R = RANK;
constexpr float scale = (float)(SCALE);

// The span of a row of w, and its column of y.
__device__ __forceinline__ int span_of_row(int i) { return i < N0 ? 0 : i < N0 + N1 ? 1 : 2; }
__device__ __forceinline__ int column_of_row(int i) {
  return i < N0 ? AT0 + i : i < N0 + N1 ? AT1 + i - N0 : AT2 + i - N0 - N1;
}
// The row of w of a column of y, -1 for a column of no span.
__device__ __forceinline__ int row_of_column(int m) {
  if (m >= AT0 && m < AT0 + N0) return m - AT0;
  if (m >= AT1 && m < AT1 + N1) return m - AT1 + N0;
  if (m >= AT2 && m < AT2 + N2) return m - AT2 + N0 + N1;
  return -1;
}

KERNEL __launch_bounds__(THREADS, 4) lora_forward_kernel(
    real *__restrict__ y,           // (N, M)
    const real *__restrict__ base,  // (N, M)
    const real *__restrict__ u,     // (N, U)
    const real *__restrict__ w,     // (W, R)
    i64 N) {
  __shared__ float us[ROWS * U];
  i64 first = (i64)blockIdx.y * ROWS;
  int rows = N - first < ROWS ? (int)(N - first) : ROWS, m = blockIdx.x * THREADS + threadIdx.x;
  for (int i = threadIdx.x; i < rows * U; i += THREADS) us[i] = to_float(u[first * U + i]);
  __syncthreads();
  if (m >= M) return;
  int row = row_of_column(m);
  float sum[ROWS] = {};
  if (row >= 0) {
    const float *from = us + span_of_row(row) * R;
#pragma unroll 4
    for (int j = 0; j < R; j++) {
      float x = to_float(w[(i64)row * R + j]);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (r < rows) sum[r] += x * from[r * U + j];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    if (r < rows) {
      i64 at = (first + r) * M + m;
      y[at] = from_float<real>(to_float(base[at]) + scale * sum[r]);
    }
}

// Rows of du, of the span blockIdx.y. A group of GROUP threads takes every THREADS / GROUP-th row of w, a thread one
// column of it at a time.
KERNEL __launch_bounds__(THREADS) lora_du_kernel(
    real *__restrict__ du,        // (N, U)
    const real *__restrict__ dy,  // (N, M)
    const real *__restrict__ w,   // (W, R)
    i64 N) {
  __shared__ float sums[THREADS * DU_ROWS];
  const int span = blockIdx.y, n = span == 0 ? N0 : span == 1 ? N1 : N2, at = span == 0 ? AT0 : span == 1 ? AT1 : AT2;
  const int start = span == 0 ? 0 : span == 1 ? N0 : N0 + N1, lane = threadIdx.x % GROUP, group = threadIdx.x / GROUP;
  i64 first = (i64)blockIdx.x * DU_ROWS;
  int rows = N - first < DU_ROWS ? (int)(N - first) : DU_ROWS;
  for (int j0 = 0; j0 < R; j0 += GROUP) {
    int j = j0 + lane;
    float sum[DU_ROWS] = {};
    if (j < R)
      for (int i = group; i < n; i += THREADS / GROUP) {
        float x = to_float(w[(i64)(start + i) * R + j]);
#pragma unroll
        for (int r = 0; r < DU_ROWS; r++)
          if (r < rows) sum[r] += x * to_float(dy[(first + r) * M + at + i]);
      }
    __syncthreads();  // the sums of the columns before have been read
#pragma unroll
    for (int r = 0; r < DU_ROWS; r++) sums[r * THREADS + threadIdx.x] = sum[r];
    __syncthreads();
    for (int k = threadIdx.x; k < rows * GROUP; k += THREADS) {
      int r = k / GROUP, column = j0 + k % GROUP;
      float total = 0.0f;
      for (int q = 0; q < THREADS / GROUP; q++) total += sums[r * THREADS + q * GROUP + k % GROUP];
      if (column < R) du[(first + r) * U + span * R + column] = from_float<real>(scale * total);
    }
  }
}

// 32 rows of w, one for each lane, over the range blockIdx.y of rows of dy. Warp k sums columns k, k + 8, ... of u.
KERNEL __launch_bounds__(THREADS) lora_dw_partial_kernel(
    float *__restrict__ partial,  // (gridDim.y, W, R)
    const real *__restrict__ dy,  // (N, M)
    const real *__restrict__ u,   // (N, U)
    i64 N) {
  enum { WARPS = THREADS / 32, PER = (R + WARPS - 1) / WARPS };
  __shared__ float us[DW_ROWS * U];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane;
  i64 rows = (N + gridDim.y - 1) / gridDim.y, first = blockIdx.y * rows, end = first + rows < N ? first + rows : N;
  const int from = i < W ? span_of_row(i) * R : 0, column = i < W ? column_of_row(i) : 0;
  float sum[PER] = {};
  for (i64 n = first; n < end; n += DW_ROWS) {
    int count = end - n < DW_ROWS ? (int)(end - n) : DW_ROWS;
    __syncthreads();  // the rows before have been read
    for (int k = threadIdx.x; k < count * U; k += THREADS) us[k] = to_float(u[n * U + k]);
    __syncthreads();
    if (i < W)
      for (int r = 0; r < count; r++) {
        float d = to_float(dy[(n + r) * M + column]);
#pragma unroll
        for (int k = 0; k < PER; k++)
          if (warp + k * WARPS < R) sum[k] += d * us[r * U + from + warp + k * WARPS];
      }
  }
  if (i < W)
#pragma unroll
    for (int k = 0; k < PER; k++)
      if (warp + k * WARPS < R) partial[((i64)blockIdx.y * W + i) * R + warp + k * WARPS] = sum[k];
}

KERNEL __launch_bounds__(THREADS) lora_dw_kernel(
    grad_t *__restrict__ dw,            // (W, R)
    const float *__restrict__ partial,  // (parts, W, R)
    i64 parts, i64 accumulate) {
  i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (i >= (i64)W * R) return;
  float sum = 0.0f;
  for (i64 p = 0; p < parts; p++) sum += partial[p * W * R + i];
  dw[i] = from_float<grad_t>(scale * sum + (accumulate ? to_float(dw[i]) : 0.0f));
}
