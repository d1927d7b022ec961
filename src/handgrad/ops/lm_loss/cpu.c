// lm_loss: losses = cross entropy of softmax(z), z = cap(scale (x w^T + b)), in chunks of rows      math: README.md §2
// forward           writes =        losses: (N) float, nats
// forward_backward  writes =        losses, dx: (N, C) dtype;  writes = or += dw: (Vp, C) float, db: (Vp) float
//                   += where accumulate_dw, accumulate_db; gradients are scaled by scalars->loss_scale, losses are not
// columns   V..Vp of w are padding: probability 0, gradient 0
// ignored   a row whose target is ignore_index has loss 0 and gradient 0
// numerics  x w^T is rounded to dtype, and so are the logits made from it, before the maximum is subtracted; sums in
//           float; a NaN logit gives a NaN loss
// determinism  one thread computes a row; GEMMs as gemm.c
// source    own work
#include "gemm.h"
#include "scalars.h"
#include "vmath.h"

// Enough for any of the three GEMMs of a chunk; the logits have a workspace of their own.
SCRATCH(lm_loss)(int64_t N, int64_t C, int64_t Vp, int64_t rows_per_chunk, int64_t threads) {
  int64_t rows = N < rows_per_chunk ? N : rows_per_chunk;
  int64_t y = gemm_scratch(rows, Vp, C, 0, threads), dw = gemm_scratch(Vp, C, rows, 1, threads);
  int64_t dx = gemm_scratch(rows, C, Vp, 0, threads), most = y > dw ? y : dw;
  return most > dx ? most : dx;
}

// Sum of e^(logit - max): blocks are summed, then added in order.
static float exp_sum(const real *logits, int64_t V, float max) {
  float total = 0.0f;
  for (int64_t j = 0; j < V; j += 1024) {
    int64_t end = V - j < 1024 ? V : j + 1024;
    float partial = 0.0f;
#pragma omp simd reduction(+ : partial)
    for (int64_t q = j; q < end; q++) partial += vexp(load(logits[q]) - max);
    total += partial;
  }
  return total;
}

typedef struct {
  float *losses;          // (N)
  const real *x;          // (N, C)
  const real *w;          // (Vp, C)
  const int32_t *targets; // (N)
  const real *b;          // (Vp) or NULL
  const float *weights;   // (N) or NULL
  int64_t N, C, V, Vp, ignore_index, threads;
  float scale, softcap;   // softcap 0: none
  real *logits;           // (rows_per_chunk, Vp)
  void *scratch;
} Head;
// The Head of an entry's arguments.
#define HEAD(a)                                                                                                        \
  {.losses = a->losses, .x = a->x, .w = a->w, .targets = a->targets, .b = a->b, .weights = a->weights, .N = a->N,      \
   .C = a->C, .V = a->V, .Vp = a->Vp, .ignore_index = a->ignore_index, .threads = a->threads, .logits = a->logits,     \
   .scale = (float)a->scale, .softcap = (float)a->softcap, .scratch = a->scratch}

// In place, from x w^T: the logits of a row.
static void finish(const Head *h, real *logits) {
  const real *b = h->b;
  float scale = h->scale, softcap = h->softcap;
#pragma omp simd
  for (int64_t j = 0; j < h->V; j++) {
    float z = (load(logits[j]) + (b ? load(b[j]) : 0.0f)) * scale;
    logits[j] = store(softcap == 0.0f ? z : softcap * vtanh(z / softcap));
  }
}

// dz / d(x w^T) at a logit z; 0 where z was rounded to more than softcap. inverse: 1 / softcap, or 0
static inline float slope(float z, float scale, float inverse) {
  float t = 1.0f - z * inverse * (z * inverse);
  return t > 0.0f ? scale * t : 0.0f;
}

// The loss of row n. gradient: also overwrites x w^T with its gradient, of a loss times `total`, padding with 0.
static float row_loss(const Head *h, real *logits, int64_t n, int gradient, float total) {
  int64_t V = h->V;
  int32_t target = h->targets[n];
  int shaped = h->scale != 1.0f || h->softcap != 0.0f;
  if (target == h->ignore_index) {
    if (gradient) memset(logits, 0, sizeof(real) * (size_t)h->Vp);
    return 0.0f;
  }
  if (h->b || shaped) finish(h, logits);
  float weight = h->weights ? h->weights[n] : 1.0f, max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < V; j++) max = load(logits[j]) > max ? load(logits[j]) : max;
  float sum = exp_sum(logits, V, max);
  float lse = max + logf(sum), picked = load(logits[target]);
  if (gradient) {
    float factor = total * weight / sum, scale = h->scale, inverse = h->softcap == 0.0f ? 0.0f : 1.0f / h->softcap;
    if (shaped) {
#pragma omp simd
      for (int64_t j = 0; j < V; j++)
        logits[j] = store(vexp(load(logits[j]) - max) * factor * slope(load(logits[j]), scale, inverse));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < V; j++) logits[j] = store(vexp(load(logits[j]) - max) * factor);
    }
    logits[target] = store((expf(picked - max) / sum - 1.0f) * (total * weight) * slope(picked, scale, inverse));
    memset(logits + V, 0, sizeof(real) * (size_t)(h->Vp - V));
  }
  return (lse - picked) * weight;
}

// Logits of `rows` rows from `first` on, and their losses; gradient: also overwrites the logits with their gradients.
static void chunk_losses(const Head *h, int64_t first, int64_t rows, int gradient, float total) {
  gemm(&(Gemm){.m = rows, .n = h->V, .k = h->C, .a = h->x + first * h->C, .lda = h->C, .b = h->w, .ldb = h->C,
               .b_trans = 1, .y = h->logits, .ldc = h->Vp, .threads = h->threads, .scratch = h->scratch});
#pragma omp parallel for schedule(static) if (rows * h->V > 4096)
  for (int64_t r = 0; r < rows; r++)
    h->losses[first + r] = row_loss(h, h->logits + r * h->Vp, first + r, gradient, total);
}

// db = or += the sum of dz over the rows of a chunk. Threads divide blocks of COLS columns.
static void sum_rows(float *db, const real *dz, int64_t rows, int64_t Vp, int accumulate) {
  enum { COLS = 128 };
#pragma omp parallel for schedule(static) if (rows * Vp > 16384)
  for (int64_t j = 0; j < Vp; j += COLS) {
    int64_t cols = Vp - j < COLS ? Vp - j : COLS;
    float total[COLS] = {0};
    for (int64_t r = 0; r < rows; r++)
      for (int64_t q = 0; q < cols; q++) total[q] += load(dz[r * Vp + j + q]);
    for (int64_t q = 0; q < cols; q++) db[j + q] = total[q] + (accumulate ? db[j + q] : 0.0f);
  }
}

ENTRY(lm_loss_forward) {
  Head h = HEAD(a);
  int64_t rows_per_chunk = a->rows;
  for (int64_t first = 0; first < h.N; first += rows_per_chunk) {
    int64_t rows = h.N - first < rows_per_chunk ? h.N - first : rows_per_chunk;
    chunk_losses(&h, first, rows, 0, 0.0f);
  }
}

ENTRY(lm_loss_forward_backward) {
  real *dx = a->dx;   // (N, C) or NULL
  float *dw = a->dw;  // (Vp, C) or NULL
  float *db = a->db;  // (Vp) or NULL
  Head h = HEAD(a);
  int64_t rows_per_chunk = a->rows;
  const StepScalars *scalars = a->scalars;
  for (int64_t first = 0; first < h.N; first += rows_per_chunk) {
    int64_t rows = h.N - first < rows_per_chunk ? h.N - first : rows_per_chunk;
    chunk_losses(&h, first, rows, 1, scalars->loss_scale);
    if (db) sum_rows(db, h.logits, rows, h.Vp, a->accumulate_db || first > 0);
    const real *x = h.x + first * h.C;
    if (dw)
      gemm(&(Gemm){.m = h.Vp, .n = h.C, .k = rows, .a = h.logits, .lda = h.Vp, .a_trans = 1, .b = x, .ldb = h.C,
                   .sum = dw, .ldc = h.C, .accumulate = a->accumulate_dw || first > 0, .threads = h.threads,
                   .scratch = h.scratch});
    if (dx)
      gemm(&(Gemm){.m = rows, .n = h.C, .k = h.Vp, .a = h.logits, .lda = h.Vp, .b = h.w, .ldb = h.C,
                   .y = dx + first * h.C, .ldc = h.C, .threads = h.threads, .scratch = h.scratch});
  }
}
