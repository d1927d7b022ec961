// fill: x = or += value                                                                            math: README.md §2
// writes = or +=  x: (n) f32
// source    own work
#include "kernel.h"

ENTRY(fill) {
  float *x = a->x;  // (n)
  int64_t n = a->n;
  float value = a->value;
  int accumulate = (int)a->accumulate_x;
  if (accumulate && value == 0.0f) return;
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) x[i] = accumulate ? x[i] + value : value;
}
