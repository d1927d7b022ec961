// add_norm: s = x + h + hb;  y = (s - mean) * rstd * w + b;  norm: y of s = x      math: README.md §2, §3
// add_rms_norm, rms_norm: y = s * rstd * w, without mean and b
// forward   writes =  s, y: (N, C) dtype;  mean, rstd: (N) f32
// backward  writes =  dx: (N, C) dtype;  = or += dw, db, dhb: (C) f32, those that are not NULL   dx also serves as dh
// numerics  sums in f32; two-pass variance; eps inside the root; statistics are those of the rounded s
// layout    threads divide rows; dw, db, dhb: each chunk of rows is summed, then threads divide columns to add chunks
// determinism  chunks depend on N alone and are added in order, for any number of threads
// source    own work
#include "kernel.h"

// Kernels pass LAYER or RMS as a constant, and the functions of a row are inlined into them: each compiles to the
// passes that its norm needs. An RMS norm has no mean, b and db: NULL.
enum { LAYER, RMS };
#define INLINE static inline __attribute__((always_inline))

INLINE void add_row(real *s, const real *x, const real *h, const real *hb, int64_t C) {
  if (hb) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) s[c] = store(load(x[c]) + (load(h[c]) + load(hb[c])));
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) s[c] = store(load(x[c]) + load(h[c]));
  }
}

// Statistics and y of one row, in three passes, or two; the row stays in L1. The second pass also sums the rounding
// error of the mean, which would reach every y where the mean is far from zero.
INLINE void norm_row(real *restrict y, float *mean, float *rstd, const real *restrict s, const real *restrict w,
                     const real *restrict b, int64_t C, float eps, int kind) {
  float m = 0.0f, rest = 0.0f, squares = 0.0f;
  if (kind == LAYER) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) sum += load(s[c]);
    m = sum / (float)C;
  }
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t c = 0; c < C; c++) {
    float centred = load(s[c]) - m;
    if (kind == LAYER) rest += centred;
    squares += centred * centred;
  }
  if (kind == LAYER) *mean = m += rest / (float)C;
  float r = *rstd = 1.0f / sqrtf(squares / (float)C + eps);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    float scaled = (load(s[c]) - m) * r * load(w[c]);
    y[c] = store(kind == LAYER ? scaled + load(b[c]) : scaled);
  }
}

ENTRY(add_norm_forward) {
  real *s = a->s, *y = a->y;               // (N, C)
  float *mean = a->mean, *rstd = a->rstd;  // (N)
  const real *x = a->x, *h = a->h;         // (N, C)
  const real *w = a->w, *b = a->b;         // (C)
  const real *hb = a->hb;                  // (C) or NULL
  int64_t N = a->N, C = a->C;
  float eps = a->eps;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    add_row(s + n * C, x + n * C, h + n * C, hb, C);
    norm_row(y + n * C, mean + n, rstd + n, s + n * C, w, b, C, eps, LAYER);
  }
}

ENTRY(add_rms_norm_forward) {
  real *s = a->s, *y = a->y;        // (N, C)
  float *rstd = a->rstd;            // (N)
  const real *x = a->x, *h = a->h;  // (N, C)
  const real *w = a->w;             // (C)
  const real *hb = a->hb;           // (C) or NULL
  int64_t N = a->N, C = a->C;
  float eps = a->eps;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    add_row(s + n * C, x + n * C, h + n * C, hb, C);
    norm_row(y + n * C, NULL, rstd + n, s + n * C, w, NULL, C, eps, RMS);
  }
}

ENTRY(norm_forward) {
  real *y = a->y;                          // (N, C)
  float *mean = a->mean, *rstd = a->rstd;  // (N)
  const real *x = a->x;                    // (N, C)
  const real *w = a->w, *b = a->b;         // (C)
  int64_t N = a->N, C = a->C;
  float eps = a->eps;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) norm_row(y + n * C, mean + n, rstd + n, x + n * C, w, b, C, eps, LAYER);
}

ENTRY(rms_norm_forward) {
  real *y = a->y;                           // (N, C)
  float *rstd = a->rstd;                    // (N)
  const real *x = a->x, *w = a->w;          // (N, C); (C)
  int64_t N = a->N, C = a->C;
  float eps = a->eps;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) norm_row(y + n * C, NULL, rstd + n, x + n * C, w, NULL, C, eps, RMS);
}

// Rows of one chunk: at least 16, and at most 128 chunks, so that partial sums stay small.
static int64_t chunk_rows(int64_t N) {
  int64_t rows = (N + 127) / 128;
  return rows > 16 ? rows : 16;
}
static int64_t num_chunks(int64_t N) { return (N + chunk_rows(N) - 1) / chunk_rows(N); }

static int64_t num_sums(int kind) { return kind == LAYER ? 3 : 2; }  // column sums of a chunk: dw, db, dhb; or dw, dhb

SCRATCH(norm_backward)(int64_t N, int64_t C, int64_t threads) {
  (void)threads;
  return num_chunks(N) * num_sums(LAYER) * C * (int64_t)sizeof(float);
}
SCRATCH(rms_norm_backward)(int64_t N, int64_t C, int64_t threads) {
  (void)threads;
  return num_chunks(N) * num_sums(RMS) * C * (int64_t)sizeof(float);
}

// dx = ds + rstd * (dn - mean of dn - n * mean of dn n), n = (s - mean) * rstd, dn = dy * w; adds a row to dw, db, dhb.
// An RMS norm: n = s * rstd, and without the mean of dn. learns: dw and db are summed; dx, dhb may be NULL.
INLINE void norm_row_backward(real *restrict dx, float *restrict dw, float *restrict db, float *restrict dhb,
                              const real *restrict dy, const real *restrict ds, const real *restrict s,
                              const real *restrict w, float mean, float rstd, int64_t C, int kind, int learns) {
  float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t c = 0; c < C; c++) {
    float g = load(dy[c]), normed = (load(s[c]) - mean) * rstd, dn = g * load(w[c]);
    dot += dn * normed;
    if (learns) dw[c] += g * normed;
    if (kind == LAYER) {
      sum += dn;
      if (learns) db[c] += g;
    }
  }
  if (!dx && !dhb) return;
  sum = kind == LAYER ? sum / (float)C : 0.0f;
  dot /= (float)C;
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    float normed = (load(s[c]) - mean) * rstd, dn = load(dy[c]) * load(w[c]);
    float d = (ds ? load(ds[c]) : 0.0f) + rstd * (dn - sum - normed * dot);
    if (dx) dx[c] = store(d);
    if (dhb) dhb[c] += d;
  }
}

// dx of the rows of chunk k, and their column sums: sums (num_sums, C)
INLINE void norm_chunk_backward(real *dx, float *sums, int has_dhb, const real *dy, const real *ds, const real *s,
                                const real *w, const float *mean, const float *rstd, int64_t k, int64_t N, int64_t C,
                                int kind, int learns) {
  int64_t rows = chunk_rows(N), dhb = num_sums(kind) - 1;
  memset(sums, 0, (size_t)((dhb + has_dhb) * C) * sizeof(float));
  for (int64_t n = k * rows; n < N && n < (k + 1) * rows; n++)
    norm_row_backward(dx ? dx + n * C : NULL, sums, kind == LAYER ? sums + C : NULL, has_dhb ? sums + dhb * C : NULL,
                      dy + n * C, ds ? ds + n * C : NULL, s + n * C, w, kind == LAYER ? mean[n] : 0.0f, rstd[n], C,
                      kind, learns);
}

// d = or += the sum of all chunks, columns [from, to); a chunk's sums are `stride` after those of the one before
static inline void sum_chunks(float *restrict d, int add, const float *restrict partial, int64_t chunks, int64_t stride,
                              int64_t from, int64_t to) {
  for (int64_t k = 0; k < chunks; k++) {
    int keep = add || k > 0;
#pragma omp simd
    for (int64_t c = from; c < to; c++) d[c] = (keep ? d[c] : 0.0f) + partial[k * stride + c];
  }
}

ENTRY(norm_backward) {
  real *dx = a->dx;                                // (N, C) or NULL
  float *dw = a->dw, *db = a->db, *dhb = a->dhb;   // (C) or NULL
  const real *dy = a->dy, *ds = a->ds, *s = a->s;  // (N, C); ds is the gradient of s from the residual stream, or NULL
  const real *w = a->w;                            // (C)
  const float *mean = a->mean, *rstd = a->rstd;    // (N)
  int64_t N = a->N, C = a->C;
  float *partial = a->scratch;                     // (chunks, 3, C)
  int64_t chunks = num_chunks(N), stride = num_sums(LAYER) * C;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; k++)
      if (dw || db) norm_chunk_backward(dx, partial + k * stride, dhb != NULL, dy, ds, s, w, mean, rstd, k, N, C, LAYER, 1);
      else norm_chunk_backward(dx, partial + k * stride, dhb != NULL, dy, ds, s, w, mean, rstd, k, N, C, LAYER, 0);
    int64_t from = C * hg_thread() / hg_num_threads(), to = C * (hg_thread() + 1) / hg_num_threads();
    if (dw) sum_chunks(dw, (int)a->accumulate_dw, partial, chunks, stride, from, to);
    if (db) sum_chunks(db, (int)a->accumulate_db, partial + C, chunks, stride, from, to);
    if (dhb) sum_chunks(dhb, (int)a->accumulate_dhb, partial + 2 * C, chunks, stride, from, to);
  }
}

ENTRY(rms_norm_backward) {
  real *dx = a->dx;                                // (N, C) or NULL
  float *dw = a->dw, *dhb = a->dhb;                // (C) or NULL
  const real *dy = a->dy, *ds = a->ds, *s = a->s;  // (N, C); ds or NULL
  const real *w = a->w;                            // (C)
  const float *rstd = a->rstd;                     // (N)
  int64_t N = a->N, C = a->C;
  float *partial = a->scratch;                     // (chunks, 2, C)
  int64_t chunks = num_chunks(N), stride = num_sums(RMS) * C;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; k++)
      if (dw) norm_chunk_backward(dx, partial + k * stride, dhb != NULL, dy, ds, s, w, NULL, rstd, k, N, C, RMS, 1);
      else norm_chunk_backward(dx, partial + k * stride, dhb != NULL, dy, ds, s, w, NULL, rstd, k, N, C, RMS, 0);
    int64_t from = C * hg_thread() / hg_num_threads(), to = C * (hg_thread() + 1) / hg_num_threads();
    if (dw) sum_chunks(dw, (int)a->accumulate_dw, partial, chunks, stride, from, to);
    if (dhb) sum_chunks(dhb, (int)a->accumulate_dhb, partial + C, chunks, stride, from, to);
  }
}
