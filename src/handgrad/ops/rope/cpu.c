// rope: y = qkv with every head of q and k normed (if there is a weight), then rotated        math: README.md §2, §3
// forward   writes =  y: (N, (H + 2 K) D) dtype
// backward  writes =  dqkv: (N, (H + 2 K) D) dtype;  = or += dwq, dwk: (D) f32
// numerics  norm and rotation in f32, rounded once; the backward recomputes rstd
// layout    threads divide rows; a head is in a buffer of the thread. dwq, dwk: each chunk of rows is summed, then
//           threads divide columns to add chunks
// determinism  chunks depend on N alone and are added in order, for any number of threads
// source    own work
#include "scalars.h"

// Floats of a thread's buffer of n elements: whole cache lines.
static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

SCRATCH(rope)(int64_t D, int64_t threads) { return threads * padded(D) * (int64_t)sizeof(float); }

// Turns every pair of x by its angle (sign 1) or back (-1). angle (R): cosines, then sines.
static inline void rotate(float *x, const float *restrict angle, float sign, int64_t R, int interleaved) {
  const float *restrict cosine = angle, *restrict sine = angle + R / 2;
  if (interleaved) {
    for (int64_t i = 0; i < R / 2; i++) {
      float u = x[2 * i], v = x[2 * i + 1], s = sign * sine[i];
      x[2 * i] = u * cosine[i] - v * s;
      x[2 * i + 1] = v * cosine[i] + u * s;
    }
    return;
  }
  float *restrict low = x, *restrict high = x + R / 2;
#pragma omp simd
  for (int64_t i = 0; i < R / 2; i++) {
    float u = low[i], v = high[i], s = sign * sine[i];
    low[i] = u * cosine[i] - v * s;
    high[i] = v * cosine[i] + u * s;
  }
}

// 1 / the root mean square of a head. Not inline: gcc 12 copies the caller's loop and vectorises the sum in one copy only.
static __attribute__((noinline)) float inverse_rms(const real *restrict x, int64_t D, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < D; i++) squares += load(x[i]) * load(x[i]);
  return 1.0f / sqrtf(squares / (float)D + eps);
}

ENTRY(rope_forward) {
  real *restrict y = a->y;                // (N, (H + 2 K) D)
  const real *restrict qkv = a->qkv;      // (N, (H + 2 K) D)
  const float *table = a->table;          // (S, R)
  const real *wq = a->wq, *wk = a->wk;    // (D) or NULL
  int64_t N = a->N, T = a->T, H = a->H, K = a->K, D = a->D, R = a->R, row = (H + 2 * K) * D;
  float eps = a->eps;
  int decode = a->decode != 0, interleaved = a->interleaved != 0;
  const StepScalars *scalars = a->scalars;
  int64_t position = decode ? scalars->position : 0;  // in decode rows continue what is in the cache
#pragma omp parallel
  {
    float *head = (float *)a->scratch + hg_thread() * padded(D);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      for (int64_t h = 0; h < H + K; h++) {
        const real *x = qkv + n * row + h * D, *w = h < H ? wq : wk;
        real *to = y + n * row + h * D;
        float rstd = w ? inverse_rms(x, D, eps) : 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) head[i] = load(x[i]) * rstd;
        if (w)
#pragma omp simd
          for (int64_t i = 0; i < D; i++) head[i] *= load(w[i]);
        rotate(head, table + (position + n % T) * R, 1.0f, R, interleaved);
#pragma omp simd
        for (int64_t i = 0; i < D; i++) to[i] = store(head[i]);
      }
      memcpy(y + n * row + (H + K) * D, qkv + n * row + (H + K) * D, (size_t)(K * D) * sizeof(real));
    }
  }
}

// Rows of one chunk: at least 16, and at most 128 chunks, so that partial sums stay small.
static int64_t chunk_rows(int64_t N) {
  int64_t rows = (N + 127) / 128;
  return rows > 16 ? rows : 16;
}
static int64_t num_chunks(int64_t N) { return (N + chunk_rows(N) - 1) / chunk_rows(N); }

SCRATCH(rope_backward)(int64_t N, int64_t D, int64_t threads) {
  return (num_chunks(N) * 2 * padded(D) + threads * padded(D)) * (int64_t)sizeof(float);
}

// Adds a head to dw; d (D), the gradient of the norm's output, becomes that of x.
static __attribute__((noinline)) void norm_head_backward(float *restrict d, float *restrict dw, const real *restrict x,
                                                         const real *restrict w, int64_t D, float eps) {
  float rstd = inverse_rms(x, D, eps), dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < D; i++) {
    float normed = load(x[i]) * rstd;
    dw[i] += d[i] * normed;
    d[i] *= load(w[i]);
    dot += d[i] * normed;
  }
  dot /= (float)D;
#pragma omp simd
  for (int64_t i = 0; i < D; i++) d[i] = rstd * (d[i] - load(x[i]) * rstd * dot);
}

// d = or += the sum of all chunks, columns [from, to)
static inline void sum_chunks(float *restrict d, int add, const float *restrict partial, int64_t chunks, int64_t stride,
                              int64_t from, int64_t to) {
  for (int64_t k = 0; k < chunks; k++) {
    int keep = add || k > 0;
    for (int64_t c = from; c < to; c++) d[c] = (keep ? d[c] : 0.0f) + partial[k * stride + c];
  }
}

ENTRY(rope_backward) {
  real *restrict dqkv = a->dqkv;          // (N, (H + 2 K) D)
  float *dwq = a->dwq, *dwk = a->dwk;     // (D) or NULL
  const real *restrict dy = a->dy;        // (N, (H + 2 K) D)
  const real *restrict qkv = a->qkv;      // (N, (H + 2 K) D), or NULL without weights
  const float *table = a->table;          // (S, R)
  const real *wq = a->wq, *wk = a->wk;    // (D) or NULL
  int64_t N = a->N, T = a->T, H = a->H, K = a->K, D = a->D, R = a->R, row = (H + 2 * K) * D, stride = 2 * padded(D);
  float eps = a->eps, *partial = a->scratch;  // (chunks, 2, D): dwq, dwk
  int interleaved = a->interleaved != 0;
  int64_t rows = chunk_rows(N), chunks = num_chunks(N);
#pragma omp parallel
  {
    float *head = partial + chunks * stride + hg_thread() * padded(D);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; k++) {
      memset(partial + k * stride, 0, (size_t)stride * sizeof(float));
      for (int64_t n = k * rows; n < N && n < (k + 1) * rows; n++) {
        for (int64_t h = 0; h < H + K; h++) {
          int64_t at = n * row + h * D;
          const real *w = h < H ? wq : wk;
#pragma omp simd
          for (int64_t i = 0; i < D; i++) head[i] = load(dy[at + i]);
          rotate(head, table + n % T * R, -1.0f, R, interleaved);
          if (w) norm_head_backward(head, partial + k * stride + (h < H ? 0 : padded(D)), qkv + at, w, D, eps);
#pragma omp simd
          for (int64_t i = 0; i < D; i++) dqkv[at + i] = store(head[i]);
        }
        memcpy(dqkv + n * row + (H + K) * D, dy + n * row + (H + K) * D, (size_t)(K * D) * sizeof(real));
      }
    }
    int64_t from = D * hg_thread() / hg_num_threads(), to = D * (hg_thread() + 1) / hg_num_threads();
    if (dwq) sum_chunks(dwq, (int)a->accumulate_dwq, partial, chunks, stride, from, to);
    if (dwk) sum_chunks(dwk, (int)a->accumulate_dwk, partial + padded(D), chunks, stride, from, to);
  }
}
