// sgd: p from a gradient, with or without momentum                                                 math: README.md §2
// writes =  p: (n) dtype;  m: (n) f32 if there is momentum;  in bf16 low: (n) i16, the half of the weight that p lacks
// numerics  f32;  bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// source    own work; the order of operations is that of torch.optim.SGD
#include "weights.cuh"

// -DTHREADS -DHELD  threads of a block; blocks per SM
// -DMOMENTUM        1 if there is an m;  -DNESTEROV: 1 for Nesterov's step
#if !defined(THREADS) || !defined(HELD) || !defined(MOMENTUM) || !defined(NESTEROV)
#error "sgd/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS, HELD)
sgd_kernel(real *__restrict__ p,                                         // (n)
           float *__restrict__ m,                                        // (n) or NULL
           short *__restrict__ low,                                      // (n) or NULL
           const grad_t *__restrict__ grad, const StepScalars *scalars,  // (n)
           i64 n, i64 start, float weight_decay) {  // start: of the slice in the flat vector, elements
  const float scale = scalars->grad_scale, lr = scalars->lr, momentum = (float)scalars->momentum;
  if (scale == 0.0f) return;  // the gradients are not finite
  const Draws draws(scalars, WEIGHT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Weights weight(p, low, i, n, start, draws);
#if MOMENTUM
    Pack<float, 4> mean = read(m, i, n);
#endif
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float step = g.at(k) * scale + weight_decay * weight.at(k);
#if MOMENTUM
      mean.v[k] = momentum * mean.v[k] + step;
      step = NESTEROV ? step + momentum * mean.v[k] : mean.v[k];
#endif
      weight.set(k, weight.at(k) - lr * step);
    }
#if MOMENTUM
    write(m, mean, i, n);
#endif
    weight.write_to(p, low, i, n);
  }
}
