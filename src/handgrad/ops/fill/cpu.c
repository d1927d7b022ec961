// fill: x = value in the first micro-step, nothing later                                           math: README.md §2
// writes =  x: (n) f32
// source    own work
#include "knobs.h"

ENTRY(fill) {
  float *x = P(0);  // (n)
  int64_t n = I(1);
  float value = F(2);
  const Knobs *knobs = P(3);
  if (knobs->micro_step > 0) return;
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) x[i] = value;
}
