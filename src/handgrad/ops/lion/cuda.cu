// lion: p moves by the sign of an interpolation of momentum and gradient; decay is decoupled        math: README.md §2
// writes =  p: (n) dtype;  m: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32;  bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// source    after Chen et al. 2023, algorithm 2
#include "weights.cuh"

// -DTHREADS -DHELD  threads of a block; blocks per SM
// -DBETA1 -DBETA2   doubles: 1 - 0.999f would be wrong by 1e-5
#if !defined(THREADS) || !defined(HELD) || !defined(BETA1) || !defined(BETA2)
#error "lion/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS, HELD)
lion_kernel(real *__restrict__ p,                                         // (n)
            float *__restrict__ m,                                        // (n)
            short *__restrict__ low,                                      // (n) or NULL
            const grad_t *__restrict__ grad, const StepScalars *scalars,  // (n)
            i64 n, i64 start, float weight_decay) {  // start: of the slice in the flat vector, elements
  const float scale = scalars->grad_scale, lr = scalars->lr;
  if (scale == 0.0f) return;  // the gradients are not finite
  const float shrink = (float)(1.0 - (double)lr * (double)weight_decay);
  const float keep1 = (float)BETA1, take1 = (float)(1.0 - BETA1), keep2 = (float)BETA2, take2 = (float)(1.0 - BETA2);
  const Draws draws(scalars, WEIGHT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<float, 4> mean = read(m, i, n);
    Weights weight(p, low, i, n, start, draws);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float d = g.at(k) * scale, side = keep1 * mean.v[k] + take1 * d;
      float sign = (float)(side > 0.0f) - (float)(side < 0.0f);
      mean.v[k] = keep2 * mean.v[k] + take2 * d;
      weight.set(k, shrink * weight.at(k) - lr * sign);
    }
    write(m, mean, i, n);
    weight.write_to(p, low, i, n);
  }
}
