// rms: the root mean square of a parameter's weights                                               math: README.md §2
// writes =  y: (1) f32
// numerics  squares and sums in double
// layout    a grid that fills the GPU writes a sum per block; one block adds them up
// determinism  fixed order, of threads and blocks; it depends on n and the number of SMs
// source    own work
// -DBLOCKS       of the first kernel
// -DTHREADS      of a block; -DSUM_THREADS: of the block that adds up all blocks
#if !defined(BLOCKS) || !defined(THREADS) || !defined(SUM_THREADS)
#error "rms/op.py defines these"
#endif
#include "weights.cuh"
#include "squares.cuh"

KERNEL __launch_bounds__(THREADS)
rms_kernel(double *__restrict__ partial,  // (BLOCKS)
           const real *__restrict__ p,    // (n)
           const short *__restrict__ low, // (n) or NULL
           i64 n) {
  const Draws none = {};
  double sum = 0.0;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)BLOCKS * THREADS * 4) {
    const Weights weight(p, low, i, n, 0, none);  // it rounds nothing, so the compiler drops the draws
#pragma unroll
    for (int k = 0; k < 4; k++) sum += (double)weight.at(k) * (double)weight.at(k);
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL __launch_bounds__(SUM_THREADS)
rms_sum_kernel(float *__restrict__ y,                // (1)
               const double *__restrict__ partial,  // (BLOCKS)
               i64 count, float least) {
  const double sum = sum_of_partials(partial);
  if (threadIdx.x == 0) y[0] = fmaxf((float)sqrt(sum / (double)count), least);
}
