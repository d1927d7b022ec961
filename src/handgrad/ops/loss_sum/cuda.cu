// loss_sum: scalars.loss_sum = or += sum of losses                                                  math: README.md §2
// writes = or +=  scalars.loss_sum
// numerics  the sum is a double
// layout    one block of 1024 threads, each with every 1024th loss: 256 KiB for 65,536 rows
// determinism  the order is that of threads
// source    own work
#include "kernel.cuh"

KERNEL __launch_bounds__(1024)
loss_sum_kernel(StepScalars *scalars, const float *__restrict__ losses,  // (N)
                i64 N, i64 accumulate) {
  __shared__ double sums[1024];
  double sum = 0.0;
  for (i64 n = threadIdx.x; n < N; n += 1024) sum += (double)losses[n];
  sums[threadIdx.x] = sum;
#pragma unroll
  for (int half = 512; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) scalars->loss_sum = sums[0] + (accumulate ? scalars->loss_sum : 0.0);
}
