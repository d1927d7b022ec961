// add_norm: s = x + h + hb;  y = (s - mean) * rstd * w + b;  norm: the same of x alone      math: README.md §2, §3
// add_rms_norm, rms_norm: y = s * rstd * w, without mean and b, by the same kernels
// forward   writes =  s, y: (N, C) dtype;  mean, rstd: (N) f32
// backward  writes =  dx: (N, C) dtype;  = or += dw, db, dhb: (C) grad_t   dx also serves as dh
// numerics  sums in f32; two-pass variance; eps inside the root; statistics are those of the rounded s
// layout    a row is in the registers of a group of ROW_THREADS: a warp, or a block if it is long; C is a constant
//           backward: a grid that fills the GPU walks over rows; a thread sums dw, db, dhb of its columns in registers
// determinism  fixed order: rows of a group, groups of a block, then blocks (norm_backward_sum); no atomics
// speed     H100 80GB, N=65536 C=768 bf16, in a traced step, 2026-11-24: add_norm 2.72 TB/s (91 % of the copy rate),
//           norm_backward 2.49 TB/s (83 %)
// source    own work
#include "ptx.cuh"

// -DCOLUMNS      C
// -DVEC          elements of one access: 16 bytes of them where C is a multiple, else 1
// -DROW_THREADS  threads per row: 32, or all of a block
// -DROWS         rows that a block holds at a time
// -DBIAS         1: hb is given
// -DRMS          1: an RMS norm; mean, b and db are NULL
#if !defined(RMS) || !defined(COLUMNS) || !defined(VEC) || !defined(ROW_THREADS) || !defined(ROWS) || !defined(FORWARD)
#error "add_norm/op.py defines these"
#endif

// Rows are processed from the last to the first: the GEMM before wrote the last ones last, and the GEMM after reads the
// first ones first, so that part of each input is still in L2.
constexpr int C = COLUMNS, PACKS = (C + ROW_THREADS * VEC - 1) / (ROW_THREADS * VEC);
typedef Pack<real, VEC> Pk;

// First column of a thread's pack k, and whether it is inside the row: a constant for all but the last pack.
__device__ __forceinline__ int column(int k, int lane) { return (k * ROW_THREADS + lane) * VEC; }
__device__ __forceinline__ bool inside(int k, int lane) {
  return (k + 1) * ROW_THREADS * VEC <= C || column(k, lane) < C;
}

// The sum over a row, in all its threads.
__device__ __forceinline__ float row_sum(float x, float *buffer) {
  if constexpr (ROW_THREADS == 32) return warp_reduce(x, Sum());
  else return block_reduce<ROW_THREADS>(x, Sum(), 0.0f, buffer);
}

#if FORWARD
// y and the statistics of row n, which its threads hold. The second sum corrects the rounding error of the mean; an RMS
// norm needs neither.
__device__ __forceinline__ void norm_row(real *y, float *mean, float *rstd, const Pk s[PACKS], const real *w,
                                         const real *b, i64 n, int lane, float eps, float *buffer) {
  float sum = 0.0f, rest = 0.0f, squares = 0.0f, m = 0.0f;
  if constexpr (!RMS) {
#pragma unroll
    for (int k = 0; k < PACKS; k++)
      if (inside(k, lane))
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += s[k].at(i);
    m = row_sum(sum, buffer) / C;
  }
#pragma unroll
  for (int k = 0; k < PACKS; k++)
    if (inside(k, lane))
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        float centred = s[k].at(i) - m;
        rest += centred;
        squares += centred * centred;
      }
  if constexpr (!RMS) m += row_sum(rest, buffer) / C;
  float r = 1.0f / sqrtf(row_sum(squares, buffer) / C + eps);
#pragma unroll
  for (int k = 0; k < PACKS; k++)
    if (inside(k, lane)) {
      Pk scale = load<real, VEC>(w + column(k, lane)), shift = {}, out;
      if constexpr (!RMS) shift = load<real, VEC>(b + column(k, lane));
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        float scaled = (s[k].at(i) - m) * r * scale.at(i);
        out.set(i, RMS ? scaled : scaled + shift.at(i));
      }
      store(y + n * C + column(k, lane), out);
    }
  if (lane == 0) {
    if constexpr (!RMS) mean[n] = m;
    rstd[n] = r;
  }
}

KERNEL __launch_bounds__(ROW_THREADS * ROWS)
add_norm_forward_kernel(real *__restrict__ s, real *__restrict__ y,            // (N, C)
                        float *__restrict__ mean, float *__restrict__ rstd,    // (N)
                        const real *__restrict__ x, const real *__restrict__ h,  // (N, C), not read again
                        const real *__restrict__ w, const real *__restrict__ b,  // (C)
                        const real *__restrict__ hb,                             // (C) or NULL
                        i64 N, float eps) {
  __shared__ float buffer[32];
  int lane = threadIdx.x % ROW_THREADS;
  i64 n = N - 1 - ((i64)blockIdx.x * ROWS + threadIdx.x / ROW_THREADS);
  if (n < 0) return;  // a whole warp
  Pk row[PACKS], branch[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; k++)
    if (inside(k, lane)) {
      row[k] = load_streaming<real, VEC>(x + n * C + column(k, lane));
      branch[k] = load_streaming<real, VEC>(h + n * C + column(k, lane));
    }
#pragma unroll
  for (int k = 0; k < PACKS; k++)
    if (inside(k, lane)) {
      Pk bias = {};
      if constexpr (BIAS) bias = load<real, VEC>(hb + column(k, lane));
#pragma unroll
      for (int i = 0; i < VEC; i++) row[k].set(i, row[k].at(i) + (branch[k].at(i) + bias.at(i)));
      store_streaming(s + n * C + column(k, lane), row[k]);
    }
  norm_row(y, mean, rstd, row, w, b, n, lane, eps, buffer);
}

KERNEL __launch_bounds__(ROW_THREADS * ROWS)
norm_forward_kernel(real *__restrict__ y,                                    // (N, C)
                    float *__restrict__ mean, float *__restrict__ rstd,      // (N)
                    const real *__restrict__ x,                              // (N, C)
                    const real *__restrict__ w, const real *__restrict__ b,  // (C)
                    i64 N, float eps) {
  __shared__ float buffer[32];
  int lane = threadIdx.x % ROW_THREADS;
  i64 n = N - 1 - ((i64)blockIdx.x * ROWS + threadIdx.x / ROW_THREADS);
  if (n < 0) return;  // a whole warp
  Pk row[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; k++)
    if (inside(k, lane)) row[k] = load_streaming<real, VEC>(x + n * C + column(k, lane));
  norm_row(y, mean, rstd, row, w, b, n, lane, eps, buffer);
}
#else
// -DWEIGHTS        1: dw or db is wanted
// -DSUMS           column sums: dw and, unless RMS, db if WEIGHTS; dhb if wanted
// -DDX             1: dx is wanted
// -DSTREAMS        3; 2 where ds is not given
// -DSTAGED         1: rows are prefetched into shared memory; 0: C is odd, or too long for it
// -DBLOCKS_PER_SM  blocks per SM, which bounds registers
// -DBLOCKS         blocks of the grid
// -DSUM_THREADS    of a block of norm_backward_sum_kernel: 32 x 32
#if !defined(SUMS) || !defined(STREAMS) || !defined(STAGED) || !defined(BLOCKS_PER_SM) || !defined(BLOCKS)
#error "add_norm/op.py defines these"
#endif
#if !defined(SUM_THREADS) || !defined(WEIGHTS) || !defined(DX)
#error "add_norm/op.py defines these"
#endif

constexpr int DB = 1, DHB = !WEIGHTS ? 0 : RMS ? 1 : 2;           // places among the sums; dw is the first
typedef Pack<float, VEC> ColumnSums[SUMS ? SUMS : 1][PACKS];  // of a thread's columns

// Adds up the column sums of the groups of a block, through shared memory, into block (SUMS, C).
__device__ __forceinline__ void store_column_sums(float *block, const ColumnSums &sums, float *shared, int group,
                                                  int lane) {
  float *const own = ROWS == 1 ? block : shared + group * SUMS * C;
  __syncthreads();  // all groups have read their rows
#pragma unroll
  for (int j = 0; j < SUMS; j++)
#pragma unroll
    for (int k = 0; k < PACKS; k++)
      if (inside(k, lane)) store(own + j * C + column(k, lane), sums[j][k]);
  if constexpr (ROWS > 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS * C; i += ROW_THREADS * ROWS) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < ROWS; j++) sum += shared[j * SUMS * C + i];
      block[i] = sum;
    }
  }
}

KERNEL __launch_bounds__(ROW_THREADS * ROWS, BLOCKS_PER_SM)
norm_backward_kernel(real *__restrict__ dx,                                           // (N, C) or NULL
                     float *__restrict__ partial,                                     // (BLOCKS, SUMS, C): dw, db, dhb
                     const real *__restrict__ dy, const real *__restrict__ ds,        // (N, C); ds or NULL
                     const real *__restrict__ s, const real *__restrict__ w,          // (N, C); (C)
                     const float *__restrict__ mean, const float *__restrict__ rstd,  // (N)
                     i64 N) {
  __shared__ float buffer[32];
  HG_SHARED(real, shared);  // (ROWS, 2, STREAMS, C) rows of dy, s, ds; (C) w;  in the end (ROWS, SUMS, C) float
  const int lane = threadIdx.x % ROW_THREADS, group = threadIdx.x / ROW_THREADS;
  const i64 step = (i64)BLOCKS * ROWS;
  real *const rows = shared + group * 2 * STREAMS * C, *const weight = shared + ROWS * 2 * STREAMS * C;
  const real *const streams[3] = {dy, s, ds};
  // A thread reads back only what it copied itself, so no barrier is needed.
  auto fetch = [&](i64 n, int stage) {
    if constexpr (STAGED) {
      if (n >= 0)
#pragma unroll
        for (int j = 0; j < STREAMS; j++)
#pragma unroll
          for (int k = 0; k < PACKS; k++)
            if (inside(k, lane)) {
              int c = column(k, lane);
              copy_async_streaming(rows + (stage * STREAMS + j) * C + c, streams[j] + n * C + c);
            }
      copy_async_commit();
    }
  };
  i64 n = N - 1 - ((i64)blockIdx.x * ROWS + group);
  float next_mean = !RMS && n >= 0 ? mean[n] : 0.0f, next_rstd = n >= 0 ? rstd[n] : 0.0f;
  fetch(n, 0);
  if constexpr (STAGED) {
    for (int c = threadIdx.x * VEC; c < C; c += ROW_THREADS * ROWS * VEC) store(weight + c, load<real, VEC>(w + c));
    __syncthreads();
  }
  ColumnSums sums = {};
  for (int stage = 0; n >= 0; n -= step, stage ^= 1) {
    float m = next_mean, r = next_rstd, sum = 0.0f, dot = 0.0f;
    fetch(n - step, stage ^ 1);
    if (n >= step) {
      if constexpr (!RMS) next_mean = mean[n - step];
      next_rstd = rstd[n - step];
    }
    const real *from[3] = {dy + n * C, s + n * C, ds + n * C}, *scale = w;
    if constexpr (STAGED) {
      copy_async_wait<1>();
#pragma unroll
      for (int j = 0; j < STREAMS; j++) from[j] = rows + (stage * STREAMS + j) * C;
      scale = weight;
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++)
      if (inside(k, lane)) {
        int c = column(k, lane);
        Pk g = load<real, VEC>(from[0] + c), v = load<real, VEC>(from[1] + c), a = load<real, VEC>(scale + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
          float normed = (v.at(i) - m) * r, dn = g.at(i) * a.at(i);
          if constexpr (!RMS) sum += dn;
          dot += dn * normed;
          if constexpr (WEIGHTS) sums[0][k].v[i] += g.at(i) * normed;
          if constexpr (WEIGHTS && !RMS) sums[DB][k].v[i] += g.at(i);
        }
      }
    if constexpr (!RMS) sum = row_sum(sum, buffer) / C;
    dot = row_sum(dot, buffer) / C;
    __syncwarp();  // makes the compiler read the row again instead of keeping all of it in registers
#pragma unroll
    for (int k = 0; k < PACKS; k++)
      if (inside(k, lane)) {
        int c = column(k, lane);
        Pk g = load<real, VEC>(from[0] + c), v = load<real, VEC>(from[1] + c), a = load<real, VEC>(scale + c);
        Pk rest = {}, to;
        if constexpr (STREAMS == 3) rest = load<real, VEC>(from[2] + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
          float normed = (v.at(i) - m) * r, dn = g.at(i) * a.at(i), d = rest.at(i) + r * (dn - sum - normed * dot);
          if constexpr (SUMS > DHB) sums[DHB][k].v[i] += d;
          to.set(i, d);
        }
        if constexpr (DX) store(dx + n * C + c, to);
      }
  }
  if constexpr (SUMS > 0) store_column_sums(partial + (i64)blockIdx.x * SUMS * C, sums, (float *)shared, group, lane);
}

// dw, db, dhb = or += the sums of all blocks' rows of partial. Of 32 x 32 threads, x is a column of (SUMS, C), and y
// takes every 32nd block.
KERNEL __launch_bounds__(SUM_THREADS)
norm_backward_sum_kernel(grad_t *__restrict__ dw, grad_t *__restrict__ db,  // (C) or NULL
                         grad_t *__restrict__ dhb,                          // (C) or NULL
                         const float *__restrict__ partial,                 // (BLOCKS, SUMS, C)
                         i64 accumulate_dw, i64 accumulate_db, i64 accumulate_dhb) {
  __shared__ float buffer[32][33];
  int x = threadIdx.x % 32, y = threadIdx.x / 32, c = blockIdx.x * 32 + x;
  float sum = 0.0f;
  if (c < SUMS * C)
#pragma unroll 8
    for (i64 k = y; k < BLOCKS; k += 32) sum += partial[k * SUMS * C + c];
  buffer[y][x] = sum;
  __syncthreads();
  sum = warp_reduce(buffer[x][y], Sum());  // now a warp a column
  c = blockIdx.x * 32 + y;
  if (x == 0 && c < SUMS * C) {
    const bool is_dhb = c >= DHB * C, is_dw = !is_dhb && c < C;
    grad_t *d = is_dhb ? dhb : is_dw ? dw : db, *to = d + c % C;
    const i64 accumulate = is_dhb ? accumulate_dhb : is_dw ? accumulate_dw : accumulate_db;
    if (d) *to = from_float<grad_t>(accumulate ? to_float(*to) + sum : sum);
  }
}
#endif
