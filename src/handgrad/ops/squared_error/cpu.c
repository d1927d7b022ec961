// squared_error: losses = (z - values)^2, and the gradient of z                                     math: README.md §2
// writes =  losses: (N) float;  dz: (N, 1) dtype
// numerics  float inside; dz is rounded once
// source    own work
#include "kernel.h"
#include "scalars.h"

ENTRY(squared_error) {
  float *losses = a->losses;            // (N)
  const real *z = a->z;                 // (N, 1)
  const int32_t *targets = a->targets;  // (N)
  const float *values = a->values;      // (N)
  for (int64_t n = 0; n < a->N; n++) {
    float miss = load(z[n]) - values[n];
    losses[n] = targets[n] == a->ignore_index ? 0.0f : miss * miss;
  }
}

ENTRY(squared_error_forward_backward) {
  float *losses = a->losses;            // (N)
  real *dz = a->dz;                     // (N, 1)
  const real *z = a->z;                 // (N, 1)
  const int32_t *targets = a->targets;  // (N)
  const float *values = a->values;      // (N)
  const StepScalars *scalars = a->scalars;
  for (int64_t n = 0; n < a->N; n++) {
    float miss = load(z[n]) - values[n];
    int counts = targets[n] != a->ignore_index;
    losses[n] = counts ? miss * miss : 0.0f;
    dz[n] = store(counts ? 2.0f * scalars->loss_scale * miss : 0.0f);
  }
}
