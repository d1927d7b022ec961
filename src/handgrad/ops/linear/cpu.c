// linear: y = x w^T + b, then GELU if asked                      math: README.md §2
// forward     writes =        y, pre: (N, M) dtype                pre = y before GELU, kept for the backward
// gelu        writes =        y: (N, M)                           brings y back from pre
// backward_w  writes = or +=  dw: (M, K), db: (M) float           + when the flag or scalars->micro_step is not 0
// backward_x  writes =        dx: (N, K) dtype                    with pre, where x was gelu(pre): the gradient at pre
// numerics  sums in float, rounded once; db in blocks of 64 rows
// determinism  fixed order of sums at any number of threads
// source    own work
#include "gemm.h"
#include "scalars.h"
#include "vmath.h"

// Bytes of scratch for any of the three products at these sizes.
__attribute__((visibility("default"))) int64_t KERNEL(linear_scratch)(int64_t N, int64_t M, int64_t K,
                                                                      int64_t threads) {
  int64_t y = gemm_scratch(N, M, K, 0, threads), dw = gemm_scratch(M, K, N, 1, threads);
  int64_t dx = gemm_scratch(N, K, M, 0, threads), most = y > dw ? y : dw;
  return most > dx ? most : dx;
}

ENTRY(linear_forward) {
  real *y = P(0);           // (N, M)
  real *pre = P(1);         // (N, M) or NULL
  const real *x = P(2);     // (N, K)
  const real *w = P(3);     // (M, K)
  const real *b = P(4);     // (M) or NULL
  int64_t N = I(5), M = I(6), K = I(7);
  gemm(&(Gemm){.m = N, .n = M, .k = K, .a = x, .lda = K, .b = w, .ldb = K, .b_trans = 1, .y = y, .pre = pre, .ldc = M,
               .bias = b, .gelu = (int)I(8), .threads = I(9), .scratch = P(10)});
}

ENTRY(linear_gelu) {
  real *y = P(0);           // (N, M)
  const real *pre = P(1);   // (N, M)
  int64_t n = I(2) * I(3);
#pragma omp parallel for simd schedule(static) if (n > 4096)
  for (int64_t i = 0; i < n; i++) y[i] = store(vgelu(load(pre[i])));
}

// dpre = dy gelu'(pre); dpre may be dy itself.
static void gelu_backward(real *dpre, const real *dy, const real *pre, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n > 4096)
  for (int64_t i = 0; i < n; i++) dpre[i] = store(load(dy[i]) * vgelu_grad(load(pre[i])));
}

ENTRY(linear_gelu_backward) {
  real *dpre = P(0);        // (N, M)
  const real *dy = P(1);    // (N, M)
  const real *pre = P(2);   // (N, M)
  gelu_backward(dpre, dy, pre, I(3) * I(4));
}

// db = or += the sum of dy over rows. Threads share out columns; a thread reads lines of 128 columns.
static void sum_rows(float *db, const real *dy, int64_t N, int64_t M, int accumulate) {
  enum { COLS = 128, ROWS = 64 };
#pragma omp parallel for schedule(static) if (N * M > 16384)
  for (int64_t j = 0; j < M; j += COLS) {
    int64_t cols = M - j < COLS ? M - j : COLS;
    float total[COLS] = {0};
    for (int64_t i = 0; i < N; i += ROWS) {
      int64_t end = N - i < ROWS ? N : i + ROWS;
      float part[COLS] = {0};
      for (int64_t r = i; r < end; r++) {
        for (int64_t q = 0; q < cols; q++) part[q] += load(dy[r * M + j + q]);
      }
      for (int64_t q = 0; q < cols; q++) total[q] += part[q];
    }
    for (int64_t q = 0; q < cols; q++) db[j + q] = total[q] + (accumulate ? db[j + q] : 0.0f);
  }
}

ENTRY(linear_backward_w) {
  float *dw = P(0);         // (M, K)
  float *db = P(1);         // (M) or NULL
  const real *dy = P(2);    // (N, M)
  const real *x = P(3);     // (N, K)
  int64_t N = I(4), M = I(5), K = I(6);
  int accumulate_dw = I(7) != 0, accumulate_db = I(8) != 0;
  int64_t threads = I(9);
  const StepScalars *scalars = P(10);
  int later = scalars->micro_step != 0;
  gemm(&(Gemm){.m = M, .n = K, .k = N, .a = dy, .lda = M, .a_trans = 1, .b = x, .ldb = K, .sum = dw, .ldc = K,
               .accumulate = accumulate_dw || later, .threads = threads, .scratch = P(11)});
  if (db) sum_rows(db, dy, N, M, accumulate_db || later);
}

ENTRY(linear_backward_x) {
  real *dx = P(0);          // (N, K)
  const real *dy = P(1);    // (N, M)
  const real *w = P(2);     // (M, K)
  const real *pre = P(3);   // (N, K) or NULL
  int64_t N = I(4), M = I(5), K = I(6);
  gemm(&(Gemm){.m = N, .n = K, .k = M, .a = dy, .lda = M, .b = w, .ldb = K, .y = dx, .ldc = K, .threads = I(7),
               .scratch = P(8)});
  if (pre) gelu_backward(dx, dx, pre, N * K);
}
