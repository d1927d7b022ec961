// muon_momentum: the momentum of a gradient, and the gradient moved towards it                     math: README.md §2
// writes =  m, u: (n) f32
// numerics  f32
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes VEC elements at a time
// source    own work; the lerp form of torch.optim.Muon
#include "kernel.cuh"

// -DVEC       4; 1 where n is not a multiple of 4
// -DTHREADS   of a block
// -DMOMENTUM  a double: 1 - 0.95f would be wrong by 1e-6
#if !defined(VEC) || !defined(THREADS) || !defined(MOMENTUM)
#error "muon/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
muon_momentum_kernel(float *__restrict__ m, float *__restrict__ u,                          // (n)
                     const grad_t *__restrict__ grad, const StepScalars *scalars, i64 n) {  // (n)
  const float scale = scalars->grad_scale, momentum = (float)MOMENTUM, rest = (float)(1.0 - MOMENTUM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += (i64)gridDim.x * THREADS * VEC) {
    Pack<float, VEC> out = {};
    if (scale != 0.0f) {  // else the gradients are not finite
      Pack<grad_t, VEC> g = load_streaming<grad_t, VEC>(grad + i);
      Pack<float, VEC> mean = load_streaming<float, VEC>(m + i);
#pragma unroll
      for (int k = 0; k < VEC; k++) {
        float d = g.at(k) * scale;
        mean.v[k] += rest * (d - mean.v[k]);
        out.v[k] = d + momentum * (mean.v[k] - d);
      }
      store_streaming(m + i, mean);
    }
    store(u + i, out);
  }
}
