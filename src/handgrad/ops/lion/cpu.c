// lion: p moves by the sign of an interpolation of momentum and gradient; decay is decoupled        math: README.md §2
// writes =  p: (n) dtype;  m: (n) f32;  in bf16 low: (n) i16, the low half of the float32 weight
// numerics  f32;  in bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    one pass over flat vectors; threads divide blocks of elements
// source    after Chen et al. 2023, algorithm 2
#include "weights.h"

ENTRY(lion) {
  real *restrict p = a->p;               // (n)
  float *restrict m = a->m;              // (n)
  int16_t *restrict low = a->low;        // (n) or NULL
  const float *restrict grad = a->grad;  // (n)
  int64_t n = a->n, start = a->start;    // start: the first element in the flat order of all parameters
  const StepScalars *scalars = a->scalars;
  const float scale = scalars->grad_scale, lr = scalars->lr;
  const float beta1 = (float)a->beta1, rest1 = (float)(1.0 - a->beta1);
  const float beta2 = (float)a->beta2, rest2 = (float)(1.0 - a->beta2);
  const float decay = (float)(1.0 - (double)lr * a->weight_decay);
  if (scale == 0.0f) return;  // the gradients are not finite
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    const float *restrict g = grad + from;
    float *restrict mean = m + from;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      float d = g[i] * scale, side = beta1 * mean[i] + rest1 * d;
      float sign = (float)(side > 0.0f) - (float)(side < 0.0f);
      mean[i] = beta2 * mean[i] + rest2 * d;
      w[i] = decay * w[i] - lr * sign;
    }
    store_weights(p + from, low ? low + from : NULL, w, start + from, count, scalars);
  }
}
