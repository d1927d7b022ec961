// squared_error: losses = (z - values)^2, and the gradient of z                                     math: README.md §2
// writes =  losses: (N) float;  dz: (N, 1) dtype
// numerics  float inside; dz is rounded once
// layout    a thread has one row
// speed     not measured: a launch, for a few numbers a text
// source    own work
#include "kernel.cuh"

// -DTHREADS  of a block
#ifndef THREADS
#error "squared_error/op.py defines THREADS"
#endif

KERNEL __launch_bounds__(THREADS)
squared_error_kernel(float *__restrict__ losses,        // (N)
                     const real *__restrict__ z,        // (N, 1)
                     const int *__restrict__ targets,   // (N)
                     const float *__restrict__ values,  // (N)
                     i64 N, i64 ignore_index) {
  i64 n = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (n >= N) return;
  float miss = to_float(z[n]) - values[n];
  losses[n] = targets[n] == ignore_index ? 0.0f : miss * miss;
}

KERNEL __launch_bounds__(THREADS)
squared_error_forward_backward_kernel(float *__restrict__ losses,        // (N)
                                      real *__restrict__ dz,             // (N, 1)
                                      const real *__restrict__ z,        // (N, 1)
                                      const int *__restrict__ targets,   // (N)
                                      const float *__restrict__ values,  // (N)
                                      const StepScalars *scalars, i64 N, i64 ignore_index) {
  i64 n = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (n >= N) return;
  float miss = to_float(z[n]) - values[n];
  bool counts = targets[n] != ignore_index;
  losses[n] = counts ? miss * miss : 0.0f;
  dz[n] = from_float<real>(counts ? 2.0f * scalars->loss_scale * miss : 0.0f);
}
