// cast: float32 weights to the element type, keeping the bits that do not fit                       math: README.md §2
// writes =  y: (n) dtype;  in bf16 low: (n) i16
// numerics  bf16: nearest, ties away from zero;  y and low together hold every bit of x
// source    own work
#include "kernel.h"

ENTRY(cast) {
  real *y = P(0);          // (n)
  int16_t *low = P(1);     // (n) in bf16
  const float *x = P(2);   // (n)
  int64_t n = I(3);
  (void)low;
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) {
#if HG_BF16
    y[i] = split_weight(x[i], low + i);
#else
    y[i] = x[i];
#endif
  }
}
