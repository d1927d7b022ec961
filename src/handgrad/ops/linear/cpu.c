// linear: y = act(x w^T + b)                                     math: README.md §2
// forward       writes =        y, pre: (N, M) dtype              pre = y before act, kept for the backward
// act           writes =        y: (N, M)                         recomputes y from pre
// act_backward  writes =        dpre: (N, M)                      dpre = dy act'(pre)
// backward_w    writes = or +=  dw: (M, K), db: (M) float         += where accumulate_dw, accumulate_db
// backward_x    writes =        dx: (N, K) dtype                  with dx0: the sum; with pre, where x was act(pre): at pre
// numerics  sums in float, rounded once; db in blocks of 64 rows
// determinism  fixed order of sums for any number of threads
// source    own work
#include "gemm.h"
#include "scalars.h"
#include "vmath.h"

// Enough for any of the three GEMMs at these sizes.
SCRATCH(linear)(int64_t N, int64_t M, int64_t K, int64_t threads) {
  int64_t y = gemm_scratch(N, M, K, 0, threads), dw = gemm_scratch(M, K, N, 1, threads);
  int64_t dx = gemm_scratch(N, K, M, 0, threads), most = y > dw ? y : dw;
  return most > dx ? most : dx;
}

ENTRY(linear_forward) {
  real *y = a->y;        // (N, M)
  real *pre = a->pre;    // (N, M) or NULL
  const real *x = a->x;  // (N, K)
  const real *w = a->w;  // (M, K)
  const real *b = a->b;  // (M) or NULL
  int64_t N = a->N, M = a->M, K = a->K;
  gemm(&(Gemm){.m = N, .n = M, .k = K, .a = x, .lda = K, .b = w, .ldb = K, .b_trans = 1, .y = y, .pre = pre, .ldc = M,
               .bias = b, .act = (int)a->act, .threads = a->threads, .scratch = a->scratch});
}

enum { BLOCK = 4096 };  // elements that a thread takes at a time

static inline __attribute__((always_inline)) void act_block(real *y, const real *pre, int64_t n, const int act) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = store(vact(load(pre[i]), act));
}

ENTRY(linear_act) {
  real *y = a->y;            // (N, M)
  const real *pre = a->pre;  // (N, M)
  int64_t n = a->N * a->M;
#pragma omp parallel for schedule(static) if (n > BLOCK)
  for (int64_t i = 0; i < n; i += BLOCK) {
    int64_t size = n - i < BLOCK ? n - i : BLOCK;
    EACH_ACT(a->act, act_block, y + i, pre + i, size)
  }
}

static inline __attribute__((always_inline)) void act_backward_block(real *dpre, const real *dy, const real *pre,
                                                                     int64_t n, const int act) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) dpre[i] = store(load(dy[i]) * vact_grad(load(pre[i]), act));
}

// dpre = dy act'(pre); dpre may be dy itself.
static void act_backward(real *dpre, const real *dy, const real *pre, int64_t n, int act) {
#pragma omp parallel for schedule(static) if (n > BLOCK)
  for (int64_t i = 0; i < n; i += BLOCK) {
    int64_t size = n - i < BLOCK ? n - i : BLOCK;
    EACH_ACT(act, act_backward_block, dpre + i, dy + i, pre + i, size)
  }
}

ENTRY(linear_act_backward) {
  real *dpre = a->dpre;      // (N, M)
  const real *dy = a->dy;    // (N, M)
  const real *pre = a->pre;  // (N, M)
  act_backward(dpre, dy, pre, a->N * a->M, (int)a->act);
}

// db = or += the sum of dy over rows. Threads divide blocks of COLS columns.
static void sum_rows(float *db, const real *dy, int64_t N, int64_t M, int accumulate) {
  enum { COLS = 128, ROWS = 64 };
#pragma omp parallel for schedule(static) if (N * M > 16384)
  for (int64_t j = 0; j < M; j += COLS) {
    int64_t cols = M - j < COLS ? M - j : COLS;
    float total[COLS] = {0};
    for (int64_t i = 0; i < N; i += ROWS) {
      int64_t end = N - i < ROWS ? N : i + ROWS;
      float partial[COLS] = {0};
      for (int64_t r = i; r < end; r++) {
        for (int64_t q = 0; q < cols; q++) partial[q] += load(dy[r * M + j + q]);
      }
      for (int64_t q = 0; q < cols; q++) total[q] += partial[q];
    }
    for (int64_t q = 0; q < cols; q++) db[j + q] = total[q] + (accumulate ? db[j + q] : 0.0f);
  }
}

ENTRY(linear_backward_w) {
  float *dw = a->dw;       // (M, K) or NULL
  float *db = a->db;       // (M) or NULL
  const real *dy = a->dy;  // (N, M)
  const real *x = a->x;    // (N, K), or NULL without dw
  int64_t N = a->N, M = a->M, K = a->K;
  if (dw)
    gemm(&(Gemm){.m = M, .n = K, .k = N, .a = dy, .lda = M, .a_trans = 1, .b = x, .ldb = K, .sum = dw, .ldc = K,
                 .accumulate = (int)a->accumulate_dw, .threads = a->threads, .scratch = a->scratch});
  if (db) sum_rows(db, dy, N, M, (int)a->accumulate_db);
}

ENTRY(linear_backward_x) {
  real *dx = a->dx;          // (N, K)
  const real *dy = a->dy;    // (N, M)
  const real *w = a->w;      // (M, K)
  const real *pre = a->pre;  // (N, K) or NULL
  const real *dx0 = a->dx0;  // (N, K) or NULL
  int64_t N = a->N, M = a->M, K = a->K;
  gemm(&(Gemm){.m = N, .n = K, .k = M, .a = dy, .lda = M, .b = w, .ldb = K, .y = dx, .addend = dx0, .ldc = K,
               .threads = a->threads, .scratch = a->scratch});
  if (pre) act_backward(dx, dx, pre, N * K, (int)a->act);
}
