// ema: a moving average of the weights                                                             math: README.md §2
// writes    average: (n) f32
// numerics  f32; the factor in double
// layout    a grid that fills the GPU; 16-byte accesses of the average
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 4 where n is a multiple, else 1
// -DLOW      1 where low is given
// -DTHREADS  of a block
// -DDECAY    a double
#if !defined(VEC) || !defined(LOW) || !defined(THREADS) || !defined(DECAY)
#error "ema/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
ema_kernel(float *__restrict__ average,    // (n)
           const real *__restrict__ p,     // (n)
           const short *__restrict__ low,  // (n) or NULL
           const StepScalars *scalars, i64 n) {
  if (scalars->grad_scale == 0.0f) return;  // no update
  const double step = (double)scalars->step, warm = (1.0 + step) / (10.0 + step);
  const float rate = (float)(1.0 - (warm < DECAY ? warm : DECAY));
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += (i64)gridDim.x * THREADS * VEC) {
    Pack<float, VEC> mean = load<float, VEC>(average + i);
    const Pack<real, VEC> weight = load<real, VEC>(p + i);
#if LOW
    const Pack<short, VEC> rest = load<short, VEC>(low + i);
#endif
#pragma unroll
    for (int k = 0; k < VEC; k++) {
      float w = weight.at(k);
#if LOW
      w = __uint_as_float(__float_as_uint(w) + (u32)(int)rest.v[k]);
#endif
      mean.v[k] += rate * (w - mean.v[k]);
    }
    store(average + i, mean);
  }
}
