// adafactor: the means of squared gradients over rows and columns, and p                           math: README.md §2
// writes =  p: (k) dtype;  row: (M) f32;  col: (K) f32;  in bf16 low: (k) i16, the low half of the float32 weight
// numerics  f32, sums of squares in double;  in bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    a pass over rows, one over columns, one over rows for the size of the step, one that makes it
// determinism  no sum is divided among threads but by rows, whose sums are added in order
// source    after Shazeer & Stern 2018, algorithm 6
#include "weights.h"

#define COLUMNS 64  // that a thread sums at a time

SCRATCH(adafactor)(int64_t M, int64_t K) { return M * (int64_t)sizeof(double) + K * (int64_t)sizeof(float); }

// row = beta row + (1 - beta) (mean over columns of g^2, + eps), likewise col. Returns the mean of the new rows.
static double update_means(float *row, float *col, const float *grad, int64_t M, int64_t K, double scale, double beta,
                           double eps) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < M; i++) {
    const float *g = grad + i * K;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < K; j++) sum += (double)g[j] * (double)g[j];
    row[i] = (float)(beta * row[i] + (1.0 - beta) * (sum * scale * scale / (double)K + eps));
  }
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < K; from += COLUMNS) {
    int64_t count = from + COLUMNS < K ? COLUMNS : K - from;
    double sums[COLUMNS] = {0};
    for (int64_t i = 0; i < M; i++) {
      const float *g = grad + i * K + from;
#pragma omp simd
      for (int64_t j = 0; j < count; j++) sums[j] += (double)g[j] * (double)g[j];
    }
    for (int64_t j = 0; j < count; j++)
      col[from + j] = (float)(beta * col[from + j] + (1.0 - beta) * (sums[j] * scale * scale / (double)M + eps));
  }
  double sum = 0.0;
  for (int64_t i = 0; i < M; i++) sum += row[i];
  return sum / (double)M;
}

ENTRY(adafactor) {
  real *restrict p = a->p;                          // (k): elements of the matrix from `first` on
  float *restrict row = a->row, *restrict col = a->col;  // (M), (K)
  int16_t *restrict low = a->low;                   // (k) or NULL
  const float *restrict grad = a->grad;             // (n) = (M, K)
  const float *factor = a->factor;                  // (1) or NULL
  double *partial = a->scratch;                     // (M)
  int64_t n = a->k, first = a->first, M = a->M, K = a->K;
  float *inverse = (float *)(partial + M);          // (K): 1 / sqrt(col)
  const StepScalars *scalars = a->scalars;
  const float scale = scalars->grad_scale;
  if (scale == 0.0f) return;  // the gradients are not finite
  double lr = scalars->lr, step = (double)(scalars->step - scalars->state_since), beta = 1.0 - pow(step, -a->decay);
  double mean = update_means(row, col, grad, M, K, scale, beta, a->eps);
  for (int64_t j = 0; j < K; j++) inverse[j] = 1.0f / sqrtf(col[j]);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < M; i++) {  // the squares of the step's row
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < K; j++) {
      double u = (double)(grad[i * K + j] * inverse[j]);
      sum += u * u;
    }
    partial[i] = sum * scale * scale * (mean / row[i]);
  }
  double squares = 0.0;
  for (int64_t i = 0; i < M; i++) squares += partial[i];
  double size = fmax(1.0, sqrt(squares / (double)a->count) / a->clip);
  double step_lr = a->relative_step ? fmin(lr, 1.0 / sqrt(step)) : lr;
  const double rate = step_lr * (factor ? factor[0] : 1.0f) / size;
  const float decay = (float)(1.0 - lr * a->weight_decay);
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from, i = (first + from) / K, j = (first + from) % K;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    for (int64_t k = 0; k < count; i++, j = 0) {  // the block's part of each row
      int64_t stop = k + K - j < count ? k + K - j : count;
      const float of_row = (float)(rate * scale * sqrt(mean / row[i]));
#pragma omp simd
      for (int64_t t = k; t < stop; t++) w[t] = decay * w[t] - of_row * (grad[first + from + t] * inverse[j + t - k]);
      k = stop;
    }
    store_weights(p + from, low ? low + from : NULL, w, a->start + from, count, scalars);
  }
}
