// fill: x = or += value                                                                            math: README.md §2
// writes = or +=  x: (n) f32
// source    own work
#include "scalars.h"

ENTRY(fill) {
  float *x = P(0);  // (n)
  int64_t n = I(1);
  float value = F(2);
  const StepScalars *scalars = P(4);
  int add = I(3) || scalars->micro_step > 0;
  if (add && value == 0.0f) return;
#pragma omp parallel for simd schedule(simd : static)
  for (int64_t i = 0; i < n; i++) x[i] = add ? x[i] + value : value;
}
