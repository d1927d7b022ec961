// lm_loss: losses = cross entropy of softmax(x w^T), one chunk of rows at a time    math: README.md §2
// forward           writes =        losses: (N) float, nats
// forward_backward  writes =        losses, dx: (N, C) dtype;  writes = or += dw: (Vp, C) float
//                   += where accumulate_dw; gradients are scaled by scalars->loss_scale, losses are not
// columns   V..Vp of w are padding: probability 0, gradient 0
// ignored   a row whose target is ignore_index has loss 0 and gradient 0
// numerics  logits are rounded to dtype before the maximum is subtracted; sums in float; a NaN logit gives a NaN loss
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

// The loss of one row. gradient: also overwrites the logits with (softmax - one_hot(target)) * scale, padding with 0.
static float row_loss(real *logits, int32_t target, int64_t V, int64_t Vp, int ignored, int gradient, float scale) {
  if (ignored) {
    if (gradient) memset(logits, 0, sizeof(real) * (size_t)Vp);
    return 0.0f;
  }
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < V; j++) max = load(logits[j]) > max ? load(logits[j]) : max;
  float sum = exp_sum(logits, V, max);
  float lse = max + logf(sum), picked = load(logits[target]);
  if (gradient) {
    float factor = scale / sum;
#pragma omp simd
    for (int64_t j = 0; j < V; j++) logits[j] = store(vexp(load(logits[j]) - max) * factor);
    logits[target] = store((expf(picked - max) / sum - 1.0f) * scale);
    memset(logits + V, 0, sizeof(real) * (size_t)(Vp - V));
  }
  return lse - picked;
}

typedef struct {
  float *losses;            // (N)
  const real *x;            // (N, C)
  const real *w;            // (Vp, C)
  const int32_t *targets;   // (N)
  int64_t N, C, V, Vp, ignore_index, threads;
  real *logits;             // (rows_per_chunk, Vp)
  void *scratch;
} Head;

// Logits of `rows` rows from `first` on, and their losses; gradient: also overwrites the logits with their gradients.
static void chunk_losses(const Head *h, int64_t first, int64_t rows, int gradient, float scale) {
  gemm(&(Gemm){.m = rows, .n = h->V, .k = h->C, .a = h->x + first * h->C, .lda = h->C, .b = h->w, .ldb = h->C,
               .b_trans = 1, .y = h->logits, .ldc = h->Vp, .threads = h->threads, .scratch = h->scratch});
#pragma omp parallel for schedule(static) if (rows * h->V > 4096)
  for (int64_t r = 0; r < rows; r++) {
    int32_t target = h->targets[first + r];
    int ignored = target == h->ignore_index;
    h->losses[first + r] = row_loss(h->logits + r * h->Vp, target, h->V, h->Vp, ignored, gradient, scale);
  }
}

ENTRY(lm_loss_forward) {
  Head h = {.losses = a->losses, .x = a->x, .w = a->w, .targets = a->targets, .N = a->N, .C = a->C, .V = a->V,
            .Vp = a->Vp, .ignore_index = a->ignore_index, .threads = a->threads, .logits = a->logits,
            .scratch = a->scratch};
  int64_t rows_per_chunk = a->rows;
  for (int64_t first = 0; first < h.N; first += rows_per_chunk) {
    int64_t rows = h.N - first < rows_per_chunk ? h.N - first : rows_per_chunk;
    chunk_losses(&h, first, rows, 0, 0.0f);
  }
}

ENTRY(lm_loss_forward_backward) {
  real *dx = a->dx;   // (N, C)
  float *dw = a->dw;  // (Vp, C)
  Head h = {.losses = a->losses, .x = a->x, .w = a->w, .targets = a->targets, .N = a->N, .C = a->C, .V = a->V,
            .Vp = a->Vp, .ignore_index = a->ignore_index, .threads = a->threads, .logits = a->logits,
            .scratch = a->scratch};
  int64_t rows_per_chunk = a->rows;
  const StepScalars *scalars = a->scalars;
  for (int64_t first = 0; first < h.N; first += rows_per_chunk) {
    int64_t rows = h.N - first < rows_per_chunk ? h.N - first : rows_per_chunk;
    chunk_losses(&h, first, rows, 1, scalars->loss_scale);
    const real *x = h.x + first * h.C;
    gemm(&(Gemm){.m = h.Vp, .n = h.C, .k = rows, .a = h.logits, .lda = h.Vp, .a_trans = 1, .b = x, .ldb = h.C,
                 .sum = dw, .ldc = h.C, .accumulate = a->accumulate_dw || first > 0, .threads = h.threads,
                 .scratch = h.scratch});
    gemm(&(Gemm){.m = rows, .n = h.C, .k = h.Vp, .a = h.logits, .lda = h.Vp, .b = h.w, .ldb = h.C,
                 .y = dx + first * h.C, .ldc = h.C, .threads = h.threads, .scratch = h.scratch});
  }
}
