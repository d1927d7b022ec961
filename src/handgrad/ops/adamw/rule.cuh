// AdamW's step of one element, for moments of any precision.
#pragma once
#include "weights.cuh"

// -DTHREADS -DHELD  threads of a block; blocks per SM
// -DBETA1 -DBETA2  doubles: 1 - 0.999f would be wrong by 1e-5
#if !defined(THREADS) || !defined(HELD) || !defined(BETA1) || !defined(BETA2)
#error "adamw/op.py defines these"
#endif

struct Rule {
  float scale, rate, root, shrink, eps;
  // All threads of a block make it: two of them compute the powers. factor: of the step, but not of the decay.
  __device__ __forceinline__ Rule(const StepScalars *scalars, float eps, float weight_decay, double factor = 1.0)
      : scale(scalars->grad_scale), shrink((float)(1.0 - (double)scalars->lr * (double)weight_decay)), eps(eps) {
    __shared__ float rates[2];
    const double age = (double)(scalars->step - scalars->state_since);
    if (threadIdx.x == 0) rates[0] = (float)(scalars->lr * factor / (1.0 - pow(BETA1, age)));
    if (threadIdx.x == 32) rates[1] = (float)(1.0 / sqrt(1.0 - pow(BETA2, age)));
    __syncthreads();
    rate = rates[0];
    root = rates[1];
  }
  // Returns the new weight and updates the moments.
  __device__ __forceinline__ float update(float weight, float &m, float &v, float grad) const {
    const float keep1 = (float)BETA1, take1 = (float)(1.0 - BETA1), keep2 = (float)BETA2, take2 = (float)(1.0 - BETA2);
    float d = grad * scale;
    m = keep1 * m + take1 * d;
    v = keep2 * v + take2 * (d * d);
    return shrink * weight - rate * (m / (sqrtf(v) * root + eps));
  }
};
