// ema: a moving average of the weights                                                             math: README.md §2
// writes    average: (n) f32
// numerics  f32; the factor in double
// layout    one pass over flat vectors, shared among threads
// source    own work
#include "scalars.h"

// The float32 weight of which p has the upper half.
static inline float whole(real p, int16_t low) {
  union { float f; uint32_t u; } x = {.f = load(p)};
  x.u += (uint32_t)(int32_t)low;
  return x.f;
}

ENTRY(ema) {
  float *restrict average = a->average;  // (n)
  const real *restrict p = a->p;         // (n)
  const int16_t *restrict low = a->low;  // (n) or NULL
  int64_t n = a->n;
  double decay = a->decay, step = (double)((const StepScalars *)a->scalars)->step;
  if (((const StepScalars *)a->scalars)->grad_scale == 0.0f) return;  // no update
  double warm = (1.0 + step) / (10.0 + step);
  float rate = (float)(1.0 - (warm < decay ? warm : decay));
  if (low) {
#pragma omp parallel for simd schedule(simd : static)
    for (int64_t i = 0; i < n; i++) average[i] += rate * (whole(p[i], low[i]) - average[i]);
  } else {
#pragma omp parallel for simd schedule(simd : static)
    for (int64_t i = 0; i < n; i++) average[i] += rate * (load(p[i]) - average[i]);
  }
}
