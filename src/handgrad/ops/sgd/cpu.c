// sgd: p from a gradient, with or without momentum                                                 math: README.md §2
// writes =  p: (n) dtype;  m: (n) f32 if there is momentum;  in bf16 low: (n) i16, the low half of the float32 weight
// numerics  f32;  in bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    one pass over flat vectors; threads divide blocks of elements
// source    own work; the order of operations is that of torch.optim.SGD
#include "weights.h"

ENTRY(sgd) {
  real *restrict p = a->p;                // (n)
  float *restrict m = a->m;               // (n) or NULL
  int16_t *restrict low = a->low;         // (n) or NULL
  const float *restrict grad = a->grad;   // (n)
  int64_t n = a->n, start = a->start;     // start: the first element in the flat order of all parameters
  int64_t nesterov = a->nesterov;
  const StepScalars *scalars = a->scalars;
  const float scale = scalars->grad_scale, lr = scalars->lr;
  const float momentum = (float)scalars->momentum, weight_decay = (float)a->weight_decay;
  if (scale == 0.0f) return;  // the gradients are not finite
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    const float *restrict g = grad + from;
    if (m) {
      float *restrict mean = m + from;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) {
        float step = g[i] * scale + weight_decay * w[i];
        mean[i] = momentum * mean[i] + step;
        w[i] -= lr * (nesterov ? step + momentum * mean[i] : mean[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; i++) w[i] -= lr * (g[i] * scale + weight_decay * w[i]);
    }
    store_weights(p + from, low ? low + from : NULL, w, start + from, count, scalars);
  }
}
