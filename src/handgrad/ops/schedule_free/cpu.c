// schedule_free: y, z and v from a gradient;  schedule_free_count: the share of a step in the average x;
// schedule_free_average: x in place of y                                                             math: README.md §2
// writes =  p: (n) dtype, y or x;  z, v: (n) f32;  in bf16 low: (n) i16, the low half of y;  count: (2) f32
// numerics  f32; factors in double;  in bf16 without low: stochastic rounding of y, ops/adamw/README.md §5
// layout    one pass over flat vectors; threads divide blocks of elements
// source    after Defazio et al. 2024, algorithm 1, and their package
#include "weights.h"

ENTRY(schedule_free_count) {
  float *count = a->count;  // (2): steps, the largest rate
  const StepScalars *scalars = a->scalars;
  double peak = count[1], lr = scalars->lr, highest = peak > lr ? peak : lr;
  if (scalars->grad_scale == 0.0f || highest == 0.0) return;  // no update, or one that moves nothing
  count[0] = (float)(count[0] * (peak / highest) * (peak / highest) + 1.0);
  count[1] = (float)highest;
}

ENTRY(schedule_free) {
  real *restrict p = a->p;                       // (n)
  float *restrict z = a->z, *restrict v = a->v;  // (n)
  int16_t *restrict low = a->low;                // (n) or NULL
  const float *restrict grad = a->grad;          // (n)
  const float *steps = a->count;                 // (2): steps, the largest rate
  int64_t n = a->n, start = a->start;            // start: the first element in the flat order of all parameters
  const StepScalars *scalars = a->scalars;
  const double step = (double)(scalars->step - scalars->state_since), part = steps[0] > 0.0f ? 1.0 / steps[0] : 0.0;
  const float scale = scalars->grad_scale, lr = scalars->lr, share = (float)part;
  const float rate = (float)(lr * (1.0 - a->beta1 * (1.0 - part)));  // of y
  const float beta2 = (float)a->beta2, rest2 = (float)(1.0 - a->beta2);
  const float root = (float)(1.0 / sqrt(1.0 - pow(a->beta2, step))), eps = (float)a->eps;
  const float weight_decay = (float)a->weight_decay;
  if (scale == 0.0f) return;  // the gradients are not finite
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    const float *restrict g = grad + from;
    float *restrict iterate = z + from, *restrict square = v + from;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      float d = g[i] * scale;
      square[i] = beta2 * square[i] + rest2 * (d * d);
      d = d / (sqrtf(square[i]) * root + eps) + weight_decay * w[i];
      w[i] = w[i] + share * (iterate[i] - w[i]) - rate * d;
      iterate[i] -= lr * d;
    }
    store_weights(p + from, low ? low + from : NULL, w, start + from, count, scalars);
  }
}

ENTRY(schedule_free_average) {
  real *restrict p = a->p;               // (n)
  const float *restrict z = a->z;        // (n)
  const int16_t *restrict low = a->low;  // (n) or NULL
  int64_t n = a->n;
  const float share = (float)(1.0 - 1.0 / a->beta1);
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *w = load_weights(buffer, p + from, low ? low + from : NULL, count);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) p[from + i] = store(w[i] + share * (z[from + i] - w[i]));
  }
}
