// rms_of_ranks: the root mean squares of parameters, from those of ranks' pieces                   math: README.md §2
// writes =  y: (k) f32
// numerics  squares and sums in double
// layout    a thread a parameter
// determinism  sums in the order of the ranks
// source    own work
// -DTHREADS      of a block
#ifndef THREADS
#error "rms/op.py defines this"
#endif
#include "kernel.cuh"

KERNEL __launch_bounds__(THREADS)
rms_of_ranks_kernel(float *__restrict__ y, const float *__restrict__ x, i64 W, i64 k, float least) {  // (k), (W, k)
  const i64 j = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (j >= k) return;
  double sum = 0.0;
  for (i64 r = 0; r < W; r++) sum += (double)x[r * k + j] * (double)x[r * k + j];
  y[j] = fmaxf((float)sqrt(sum), least);
}
