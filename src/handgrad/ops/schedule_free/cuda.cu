// schedule_free: y, z and v from a gradient                                                         math: README.md §2
// writes =  p: (n) dtype, y;  z, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; factors in double;  bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// source    after Defazio et al. 2024, algorithm 1, and their package
#include "weights.cuh"

// -DTHREADS -DHELD  threads of a block; blocks per SM
// -DBETA1 -DBETA2   doubles: 1 - 0.999f would be wrong by 1e-5
#if !defined(THREADS) || !defined(HELD) || !defined(BETA1) || !defined(BETA2)
#error "schedule_free/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS, HELD)
schedule_free_kernel(real *__restrict__ p,                                // (n)
                     float *__restrict__ z, float *__restrict__ v,        // (n)
                     short *__restrict__ low,                             // (n) or NULL
                     const grad_t *__restrict__ grad,                     // (n)
                     const float *count, const StepScalars *scalars,      // (2)
                     i64 n, i64 start, float eps, float weight_decay) {  // start: of the slice in the flat vector, elements
  const float scale = scalars->grad_scale, lr = scalars->lr;
  if (scale == 0.0f) return;  // the gradients are not finite
  __shared__ float factors[3];
  if (threadIdx.x == 0) {
    const double share = count[0] > 0.0f ? 1.0 / (double)count[0] : 0.0;
    factors[0] = (float)share;
    factors[1] = (float)((double)lr * (1.0 - BETA1 * (1.0 - share)));
    factors[2] = (float)(1.0 / sqrt(1.0 - pow(BETA2, (double)(scalars->step - scalars->state_since))));
  }
  __syncthreads();
  const float share = factors[0], rate = factors[1], root = factors[2];  // rate: of y
  const float keep2 = (float)BETA2, take2 = (float)(1.0 - BETA2);
  const Draws draws(scalars, WEIGHT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<float, 4> iterate = read(z, i, n), square = read(v, i, n);
    Weights weight(p, low, i, n, start, draws);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float d = g.at(k) * scale, w = weight.at(k);
      square.v[k] = keep2 * square.v[k] + take2 * (d * d);
      d = d / (sqrtf(square.v[k]) * root + eps) + weight_decay * w;
      weight.set(k, w + share * (iterate.v[k] - w) - rate * d);
      iterate.v[k] -= lr * d;
    }
    write(z, iterate, i, n);
    write(v, square, i, n);
    weight.write_to(p, low, i, n);
  }
}
