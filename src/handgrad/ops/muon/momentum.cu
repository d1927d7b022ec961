// muon_momentum: the momentum of a gradient, and the gradient moved towards it                     math: README.md §2
// writes =  m, u: (n) f32
// numerics  f32
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// source    own work; the lerp form of torch.optim.Muon
#include "kernel.cuh"

#ifndef THREADS  // of a block
#error "muon/op.py defines this"
#endif

KERNEL __launch_bounds__(THREADS)
muon_momentum_kernel(float *__restrict__ m, float *__restrict__ u,                          // (n)
                     const grad_t *__restrict__ grad, const StepScalars *scalars,          // (n)
                     i64 n) {  // a multiple of 4
  const float scale = scalars->grad_scale, momentum = scalars->momentum, rest = 1.0 - scalars->momentum;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<float, 4> out = {};
    if (scale != 0.0f) {  // else the gradients are not finite
      Pack<grad_t, 4> g = load_streaming<grad_t, 4>(grad + i);
      Pack<float, 4> mean = load_streaming<float, 4>(m + i);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float d = g.at(k) * scale;
        mean.v[k] += rest * (d - mean.v[k]);
        out.v[k] = d + momentum * (mean.v[k] - d);
      }
      store_streaming(m + i, mean);
    }
    store(u + i, out);
  }
}
