// loss_sum: scalars.loss_sum = or += sum of losses                                                  math: README.md §2
// writes = or +=  scalars.loss_sum
// numerics  the sum is a double
// layout    one block of -DTHREADS, each with every THREADS-th loss: 256 KiB for 65,536 rows
// determinism  the order is that of threads
// source    own work
#include "kernel.cuh"

// -DTHREADS  of the block, a power of two
#ifndef THREADS
#error "loss_sum/op.py defines THREADS"
#endif

KERNEL __launch_bounds__(THREADS)
loss_sum_kernel(StepScalars *scalars, const float *__restrict__ losses,  // (N)
                i64 N, i64 accumulate) {
  __shared__ double sums[THREADS];
  double sum = 0.0;
  for (i64 n = threadIdx.x; n < N; n += THREADS) sum += (double)losses[n];
  sums[threadIdx.x] = sum;
#pragma unroll
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) scalars->loss_sum = sums[0] + (accumulate ? scalars->loss_sum : 0.0);
}
