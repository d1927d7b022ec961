// lora: y = base, and in every span of columns + scale u w^T                               math: README.md §2, §3
// forward   writes =        y: (N, M) dtype
// backward  writes =        du: (N, U) dtype;  = or += dw: (W, R) f32 or NULL
// numerics  sums in float, rounded once; scale is applied to float values
// layout    threads divide rows (y, du), or blocks of rows of w (dw); w is transposed into scratch as float
// determinism  every element is summed by one thread, in order, for any number of threads
// source    own work
#include "kernel.h"

enum { COLS = 512, WIDE = 64, DEEP = 8 };  // columns of y at a time; rows of w and columns of u of a block of dw

SCRATCH(lora)(int64_t W, int64_t R, int64_t threads) {
  (void)threads;
  return W * R * (int64_t)sizeof(float);
}

// The spans of a call: columns of y from `at` on, rows of w from `row` on, `n` of both.
typedef struct { int64_t at, n, row; } Span;
#define SPANS(a) {{a->at0, a->n0, 0}, {a->at1, a->n1, a->n0}, {a->at2, a->n2, a->n0 + a->n1}}

// wt (R, W) = w^T
static void transpose(float *wt, const real *w, int64_t W, int64_t R) {
#pragma omp parallel for schedule(static) if (W * R > 4096)
  for (int64_t j = 0; j < R; j++)
    for (int64_t i = 0; i < W; i++) wt[j * W + i] = load(w[i * R + j]);
}

// y = base + scale u w^T, n columns of one row; wt: the first of n columns of (R, W)
static void add_columns(real *y, const real *base, const real *u, const float *wt, int64_t n, int64_t W, int64_t R,
                        float scale) {
  float sum[COLS] = {0};
  for (int64_t j = 0; j < R; j++) {
    float x = load(u[j]);
    const float *from = wt + j * W;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sum[i] += x * from[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = store(load(base[i]) + scale * sum[i]);
}

ENTRY(lora_forward) {
  real *y = a->y;           // (N, M)
  const real *base = a->base;  // (N, M)
  const real *u = a->u;     // (N, U)
  float *wt = a->scratch;   // (R, W)
  int64_t N = a->N, M = a->M, U = a->U, W = a->W, R = a->R;
  float scale = (float)a->scale;
  const Span spans[3] = SPANS(a);
  transpose(wt, a->w, W, R);
#pragma omp parallel for schedule(static) if (N * M > 4096)
  for (int64_t r = 0; r < N; r++) {
    int64_t end = 0;
    for (int p = 0; p < 3; p++) {
      Span s = spans[p];
      if (!s.n) continue;
      memcpy(y + r * M + end, base + r * M + end, (size_t)(s.at - end) * sizeof(real));
      end = s.at + s.n;
      for (int64_t i = 0; i < s.n; i += COLS) {
        int64_t at = r * M + s.at + i, n = s.n - i < COLS ? s.n - i : COLS;
        add_columns(y + at, base + at, u + r * U + p * R, wt + s.row + i, n, W, R, scale);
      }
    }
    memcpy(y + r * M + end, base + r * M + end, (size_t)(M - end) * sizeof(real));
  }
}

// dw of rows [i, i + wide) and columns [j, j + deep) of a span
static void dw_block(float *dw, const real *dy, const real *u, int64_t wide, int64_t deep, int64_t N, int64_t M,
                     int64_t U, int64_t R, float scale, int accumulate) {
  float sum[DEEP][WIDE] = {{0}};
  for (int64_t r = 0; r < N; r++) {
    float d[WIDE];
    for (int64_t i = 0; i < wide; i++) d[i] = load(dy[r * M + i]);
    for (int64_t j = 0; j < deep; j++) {
      float x = load(u[r * U + j]);
#pragma omp simd
      for (int64_t i = 0; i < wide; i++) sum[j][i] += d[i] * x;
    }
  }
  for (int64_t i = 0; i < wide; i++)
    for (int64_t j = 0; j < deep; j++) dw[i * R + j] = scale * sum[j][i] + (accumulate ? dw[i * R + j] : 0.0f);
}

ENTRY(lora_backward) {
  real *du = a->du;        // (N, U)
  float *dw = a->dw;       // (W, R) or NULL
  const real *dy = a->dy;  // (N, M)
  const real *u = a->u;    // (N, U)
  float *wt = a->scratch;  // (R, W)
  int64_t N = a->N, M = a->M, U = a->U, W = a->W, R = a->R;
  float scale = (float)a->scale;
  int accumulate = (int)a->accumulate_dw;
  const Span spans[3] = SPANS(a);
  transpose(wt, a->w, W, R);
#pragma omp parallel for schedule(static) if (N * M > 4096)
  for (int64_t r = 0; r < N; r++) {
    for (int64_t k = 0; k < U; k++) {
      Span s = spans[k / R];
      const real *from = dy + r * M + s.at;
      const float *row = wt + k % R * W + s.row;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < s.n; i++) sum += load(from[i]) * row[i];
      du[r * U + k] = store(scale * sum);
    }
  }
  for (int p = 0; p < 3 && dw; p++) {
    Span s = spans[p];
#pragma omp parallel for collapse(2) schedule(static) if (N * s.n > 4096)
    for (int64_t i = 0; i < s.n; i += WIDE)
      for (int64_t j = 0; j < R; j += DEEP)
        dw_block(dw + (s.row + i) * R + j, dy + s.at + i, u + p * R + j, s.n - i < WIDE ? s.n - i : WIDE,
                 R - j < DEEP ? R - j : DEEP, N, M, U, R, scale, accumulate);
  }
}
