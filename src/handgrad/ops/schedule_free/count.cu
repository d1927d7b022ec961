// schedule_free_count: 1 / the share of a step in the average, and the largest learning rate         math: README.md §2
// writes =  count: (2) f32
// numerics  double, rounded once
// layout    one thread
// source    own work
#include "kernel.cuh"

KERNEL schedule_free_count_kernel(float *count, const StepScalars *scalars) {
  const double peak = count[1], lr = scalars->lr, highest = peak > lr ? peak : lr;
  if (scalars->grad_scale == 0.0f || highest == 0.0) return;  // no update, or one that moves nothing
  count[0] = (float)(count[0] * (peak / highest) * (peak / highest) + 1.0);
  count[1] = (float)highest;
}
