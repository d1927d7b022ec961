// global_norm: the L2 norm of all gradients and the factor that clips it                           math: README.md §2
// writes =  scalars.grad_norm, scalars.grad_scale
// numerics  squares and sums in double: no overflow below 1e38, and the order hardly matters
// layout    a grid that fills the card leaves a sum a block; one block adds them
// determinism  the order is that of threads and blocks, which the card and n decide; NaN and inf reach grad_norm
// speed     H100 80GB, 124 M gradients in f32, in a traced step, 2026-11-24: 2.79 TB/s (93 % of the copy rate)
// source    own work; clipping as torch.nn.utils.clip_grad_norm_
#include "kernel.cuh"

// -DVEC     elements of one access: 16 bytes of them where n is a multiple, else 1
// -DBLOCKS  that sum, at most 1024 x 1024
constexpr int MANY = 4;  // accesses of a thread before it adds

// The sum over a block of `threads`, in thread 0.
template <int threads> __device__ __forceinline__ double block_sum(double x) {
  __shared__ double room[threads];
  room[threadIdx.x] = x;
#pragma unroll
  for (int half = threads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  return room[0];
}

KERNEL __launch_bounds__(256)
global_norm_kernel(double *__restrict__ partial,     // (BLOCKS)
                   const grad_t *__restrict__ grad,  // (n)
                   i64 n) {
  const i64 step = (i64)BLOCKS * 256 * VEC;
  double sum = 0.0;
  for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) * VEC; i < n; i += MANY * step) {
    Pack<grad_t, VEC> g[MANY] = {};
#pragma unroll
    for (int k = 0; k < MANY; k++)
      if (i + k * step < n) g[k] = load_once<grad_t, VEC>(grad + i + k * step);
#pragma unroll
    for (int k = 0; k < MANY; k++)
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += (double)g[k].at(j) * (double)g[k].at(j);
  }
  sum = block_sum<256>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// clip: the largest norm that passes, 0: no clipping
KERNEL __launch_bounds__(1024)
global_norm_sum_kernel(StepScalars *scalars, const double *__restrict__ partial, float clip) {  // (BLOCKS)
  double sum = 0.0;
  for (int k = threadIdx.x; k < BLOCKS; k += 1024) sum += partial[k];
  sum = block_sum<1024>(sum);
  if (threadIdx.x) return;
  float norm = (float)sqrt(sum), scale = clip > 0.0f ? fminf(1.0f, clip / (norm + 1e-6f)) : 1.0f;
  scalars->grad_norm = norm;
  scalars->grad_scale = norm < HG_INF ? scale : 0.0f;  // 0 for NaN too: no update
}
