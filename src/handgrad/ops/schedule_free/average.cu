// schedule_free_average: p, which holds y, becomes the average x                                     math: README.md §2
// writes =  p: (n) dtype
// numerics  f32; the factor in double;  x rounds to nearest
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// source    after Defazio et al. 2024
#include "weights.cuh"

// -DTHREADS  of a block
// -DBETA1    a double
#if !defined(THREADS) || !defined(BETA1)
#error "schedule_free/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
schedule_free_average_kernel(real *__restrict__ p,           // (n)
                             const float *__restrict__ z,    // (n)
                             const short *__restrict__ low,  // (n) or NULL
                             i64 n) {
  const float share = (float)(1.0 - 1.0 / BETA1);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    const Pack<float, 4> iterate = read(z, i, n);
    Pack<real, 4> x = read(p, i, n);
#if LOW
    const Pack<short, 4> rest = read(low, i, n);
#endif
#pragma unroll
    for (int k = 0; k < 4; k++) {
#if LOW
      const float w = join_weight(x.v[k], rest.v[k]);
#else
      const float w = x.at(k);
#endif
      x.set(k, w + share * (iterate.v[k] - w));
    }
    write(p, x, i, n);
  }
}
