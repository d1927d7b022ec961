// add: y = a + b                                                                                   math: README.md §2
// writes =  y: (N, C) dtype
// numerics  one rounding
// source    own work
#include "kernel.h"

ENTRY(add) {
  real *y = P(0);                        // (N, C)
  const real *x = P(1), *z = P(2);       // (N, C)
  int64_t n = I(3) * I(4);               // N, C
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) y[i] = store(load(x[i]) + load(z[i]));
}
