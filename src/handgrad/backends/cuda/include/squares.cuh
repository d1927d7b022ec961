// The sum of squares of gradients, for the norms: a partial sum per block, in double. A kernel file that includes this
// has defined VEC, BLOCKS, THREADS and SUM_THREADS (global_norm/op.py).
#pragma once
#include "kernel.cuh"

constexpr int MANY = 4;  // accesses of a thread before it adds

// The sum over a block, in thread 0.
template <int threads> __device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[threads];
  sums[threadIdx.x] = x;
#pragma unroll
  for (int half = threads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// partial[block] = the sum of the squares that a grid of BLOCKS blocks of THREADS threads divides among them
__device__ __forceinline__ void partial_squares(double *__restrict__ partial,     // (BLOCKS)
                                                const grad_t *__restrict__ grad,  // (n)
                                                i64 n) {
  const i64 step = (i64)BLOCKS * THREADS * VEC;
  double sum = 0.0;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += MANY * step) {
    Pack<grad_t, VEC> g[MANY] = {};
#pragma unroll
    for (int k = 0; k < MANY; k++)
      if (i + k * step < n) g[k] = load_streaming<grad_t, VEC>(grad + i + k * step);
#pragma unroll
    for (int k = 0; k < MANY; k++)
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += (double)g[k].at(j) * (double)g[k].at(j);
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum of all partial sums, in thread 0 of one block of SUM_THREADS threads, in a fixed order.
__device__ __forceinline__ double sum_of_partials(const double *__restrict__ partial) {  // (BLOCKS)
  double sum = 0.0;
  for (int k = threadIdx.x; k < BLOCKS; k += SUM_THREADS) sum += partial[k];
  return block_sum<SUM_THREADS>(sum);
}
