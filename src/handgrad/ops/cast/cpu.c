// cast: y = x in the element type                                                                  math: README.md §2
// writes =  y: (n)
// numerics  to bf16: round to nearest even, NaN stays NaN
// source    own work
#include "kernel.h"

ENTRY(cast) {
  real *y = P(0);          // (n)
  const float *x = P(1);   // (n)
  int64_t n = I(2);
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) y[i] = store(x[i]);
}
