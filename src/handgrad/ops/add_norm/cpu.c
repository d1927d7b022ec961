// add_norm: s = x + h + hb;  y = (s - mean) * rstd * w + b;  norm: y of s = x      math: README.md §2, §3
// forward   writes =  s, y: (N, C) dtype;  mean, rstd: (N) f32
// backward  writes =  dx: (N, C) dtype;  = or += dw, db, dhb: (C) f32      dx also serves as dh
// numerics  sums in f32; two-pass variance; eps inside the root; statistics are those of the rounded s
// layout    threads divide rows; dw, db, dhb: each chunk of rows is summed, then threads divide columns to add chunks
// determinism  chunks depend on N alone and are added in order, for any number of threads
// source    own work
#include "kernel.h"

// Statistics and y of one row, in three passes; the row stays in L1. The second pass also sums the rounding error of
// the mean, which would reach every y where the mean is far from zero.
static inline void norm_row(real *restrict y, float *mean, float *rstd, const real *restrict s, const real *restrict w,
                            const real *restrict b, int64_t C, float eps) {
  float sum = 0.0f, rest = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; c++) sum += load(s[c]);
  float m = sum / (float)C;
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t c = 0; c < C; c++) {
    float centred = load(s[c]) - m;
    rest += centred;
    squares += centred * centred;
  }
  m += rest / (float)C;
  float r = 1.0f / sqrtf(squares / (float)C + eps);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) y[c] = store((load(s[c]) - m) * r * load(w[c]) + load(b[c]));
  *mean = m;
  *rstd = r;
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
    real *sum = s + n * C;
    const real *stream = x + n * C, *branch = h + n * C;
    if (hb) {
#pragma omp simd
      for (int64_t c = 0; c < C; c++) sum[c] = store(load(stream[c]) + (load(branch[c]) + load(hb[c])));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; c++) sum[c] = store(load(stream[c]) + load(branch[c]));
    }
    norm_row(y + n * C, mean + n, rstd + n, s + n * C, w, b, C, eps);
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
  for (int64_t n = 0; n < N; n++) norm_row(y + n * C, mean + n, rstd + n, x + n * C, w, b, C, eps);
}

// Rows of one chunk: at least 16, and at most 128 chunks, so that partial sums stay small.
static int64_t chunk_rows(int64_t N) {
  int64_t rows = (N + 127) / 128;
  return rows > 16 ? rows : 16;
}
static int64_t num_chunks(int64_t N) { return (N + chunk_rows(N) - 1) / chunk_rows(N); }

SCRATCH(norm_backward)(int64_t N, int64_t C, int64_t threads) {
  (void)threads;
  return num_chunks(N) * 3 * C * (int64_t)sizeof(float);
}

// dx = ds + rstd * (dn - mean of dn - n * mean of dn n), n = (s - mean) * rstd, dn = dy * w; adds a row to dw, db, dhb
static inline void norm_row_backward(real *restrict dx, float *restrict dw, float *restrict db, float *restrict dhb,
                                     const real *restrict dy, const real *restrict ds, const real *restrict s,
                                     const real *restrict w, float mean, float rstd, int64_t C) {
  float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t c = 0; c < C; c++) {
    float g = load(dy[c]), normed = (load(s[c]) - mean) * rstd, dn = g * load(w[c]);
    sum += dn;
    dot += dn * normed;
    dw[c] += g * normed;
    db[c] += g;
  }
  sum /= (float)C;
  dot /= (float)C;
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    float normed = (load(s[c]) - mean) * rstd, dn = load(dy[c]) * load(w[c]);
    float d = (ds ? load(ds[c]) : 0.0f) + rstd * (dn - sum - normed * dot);
    dx[c] = store(d);
    if (dhb) dhb[c] += d;
  }
}

// d = or += the sum of all chunks, columns [from, to)
static inline void sum_chunks(float *restrict d, int add, const float *restrict partial, int64_t chunks, int64_t C,
                              int64_t from, int64_t to) {
  for (int64_t k = 0; k < chunks; k++) {
    int keep = add || k > 0;
#pragma omp simd
    for (int64_t c = from; c < to; c++) d[c] = (keep ? d[c] : 0.0f) + partial[k * 3 * C + c];
  }
}

ENTRY(norm_backward) {
  real *dx = a->dx;                                // (N, C)
  float *dw = a->dw, *db = a->db, *dhb = a->dhb;   // (C); dhb or NULL
  const real *dy = a->dy, *ds = a->ds, *s = a->s;  // (N, C); ds is the gradient of s from the residual stream, or NULL
  const real *w = a->w;                            // (C)
  const float *mean = a->mean, *rstd = a->rstd;    // (N)
  int64_t N = a->N, C = a->C;
  float *partial = a->scratch;                     // (chunks, 3, C)
  int64_t rows = chunk_rows(N), chunks = num_chunks(N);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; k++) {
      float *to = partial + k * 3 * C, *to_hb = dhb ? to + 2 * C : NULL;
      memset(to, 0, (size_t)(3 * C) * sizeof(float));
      for (int64_t n = k * rows; n < N && n < (k + 1) * rows; n++)
        norm_row_backward(dx + n * C, to, to + C, to_hb, dy + n * C, ds ? ds + n * C : NULL, s + n * C, w, mean[n],
                          rstd[n], C);
    }
    int64_t from = C * hg_thread() / hg_num_threads(), to = C * (hg_thread() + 1) / hg_num_threads();
    sum_chunks(dw, (int)a->accumulate_dw, partial, chunks, C, from, to);
    sum_chunks(db, (int)a->accumulate_db, partial + C, chunks, C, from, to);
    if (dhb) sum_chunks(dhb, (int)a->accumulate_dhb, partial + 2 * C, chunks, C, from, to);
  }
}
