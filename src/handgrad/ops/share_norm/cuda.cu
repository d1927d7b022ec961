// share_norm: the L2 norm of one rank's gradients of a bucket                                      math: README.md §2
// writes =  y: (1) f32
// numerics  squares and sums in double: no overflow below 1e38, and the order hardly matters
// layout    a grid that fills the GPU writes a sum per block; one block adds them up
// determinism  fixed order, of threads and blocks; it depends on n and the number of SMs. NaN and inf reach y
// source    own work
// -DVEC          elements of one access: 16 bytes of them where n is a multiple, else 1
// -DBLOCKS       of the first kernel
// -DTHREADS      of a block; -DSUM_THREADS: of the block that adds up all blocks
#if !defined(VEC) || !defined(BLOCKS) || !defined(THREADS) || !defined(SUM_THREADS)
#error "global_norm/op.py defines these"
#endif
#include "squares.cuh"

KERNEL __launch_bounds__(THREADS)
share_norm_kernel(double *__restrict__ partial,  // (BLOCKS)
                  const grad_t *__restrict__ x,  // (n)
                  i64 n) {
  partial_squares(partial, x, n);
}

KERNEL __launch_bounds__(SUM_THREADS)
share_norm_sum_kernel(float *__restrict__ y,                     // (1)
                      const double *__restrict__ partial) {  // (BLOCKS)
  const double sum = sum_of_partials(partial);
  if (threadIdx.x == 0) y[0] = (float)sqrt(sum);
}
