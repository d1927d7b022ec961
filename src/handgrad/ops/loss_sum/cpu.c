// loss_sum: scalars.loss_sum = or += sum of losses                                                  math: README.md §2
// writes = or +=  scalars.loss_sum
// numerics  sums in double
// determinism  one thread adds in order
// source    own work
#include "scalars.h"

ENTRY(loss_sum) {
  StepScalars *scalars = a->scalars;
  const float *losses = a->losses;  // (N)
  double sum = 0.0;
  for (int64_t n = 0; n < a->N; n++) sum += (double)losses[n];
  scalars->loss_sum = sum + (a->accumulate_scalars ? scalars->loss_sum : 0.0);
}
