// add: y = a + b                                                                                   math: README.md §2
// writes =  y: (N, C) dtype
// numerics  one rounding
// source    own work
#include "kernel.h"

ENTRY(add) {
  real *y = a->y;                   // (N, C)
  const real *x = a->a, *z = a->b;  // (N, C)
  int64_t n = a->N * a->C;
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) y[i] = store(load(x[i]) + load(z[i]));
}
