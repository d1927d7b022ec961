// The activation function that -DACT names, and its derivative: one a kernel, so that no thread branches.
//
// e^x and division: for bf16 those of the hardware, 2^-20 off at most. Bounds keep exponentials finite; a NaN comes
// back through x.
#pragma once
#include "ptx.cuh"
#ifndef ACT
#error "an op with an activation defines ACT"
#endif

// The numbers of ops/act.py; a test compares them.
enum { ACT_NONE, ACT_GELU_TANH, ACT_GELU_ERF, ACT_RELU, ACT_SILU, ACT_TANH };

// 1 / (1 + e^-2u) = 1/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3): GELU costs one exponential and one division.
__device__ __forceinline__ float sigmoid_2u(float x) {
#if HG_BF16
  float z = fminf(x * (-2.3022082f - 0.10294324f * x * x), 120.0f);  // -2u log2(e)
  return __fdividef(1.0f, 1.0f + exp2_fast(z));
#else
  return 1.0f / (1.0f + expf(fminf(x * (-1.5957691f - 0.07135482f * x * x), 80.0f)));
#endif
}

// 1 / (1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) {
#if HG_BF16
  return __fdividef(1.0f, 1.0f + exp2_fast(fminf(x * -1.44269504f, 120.0f)));
#else
  return 1.0f / (1.0f + expf(fminf(-x, 80.0f)));
#endif
}

// e^(-x^2 / 2), and (1 + erf(x / sqrt(2))) / 2: the formula of vmath.h.
__device__ __forceinline__ float normal_cdf(float x, float &e) {
#if HG_BF16
  e = exp2_fast(-0.72134752f * x * x);
  float t = __fdividef(1.0f, 1.0f + 0.35f * fabsf(x));
#else
  e = expf(-0.5f * x * x);
  float t = 1.0f / (1.0f + 0.35f * fabsf(x));
#endif
  float p = -0.0296618258f;
  p = p * t + 0.146266391f;
  p = p * t - 0.260007899f;
  p = p * t + 0.163571722f;
  p = p * t - 0.0257954665f;
  p = p * t + 0.106505376f;
  p = p * t + 0.119613706f;
  p = p * t + 0.139887861f;
  p = p * t + 0.139620127f;
  float q = e * (t * p);
  return x < 0.0f ? q : 1.0f - q;
}

// 1 - tanh^2 = 4 e / (1 + e)^2 with e = e^-2|x|, which does not cancel.
__device__ __forceinline__ float tanh_grad(float x) {
#if HG_BF16
  float e = exp2_fast(-2.88539008f * fabsf(x)), s = __fdividef(1.0f, 1.0f + e);
#else
  float e = expf(-2.0f * fabsf(x)), s = 1.0f / (1.0f + e);
#endif
  return 4.0f * e * s * s;
}

// act(x) and act'(x), which share their exponential; what a kernel does not use costs nothing.
__device__ __forceinline__ void act_both(float x, float &y, float &slope) {
  if constexpr (ACT == ACT_GELU_TANH) {
    float s = sigmoid_2u(x);
    y = x * s;
    slope = s + x * s * (1.0f - s) * (1.5957691216057308f + 0.21406445f * x * x);
  } else if constexpr (ACT == ACT_GELU_ERF) {
    float e, cdf = normal_cdf(x, e);
    y = x * cdf;
    slope = cdf + x * e * 0.3989422804f;  // 1 / sqrt(2 pi)
  } else if constexpr (ACT == ACT_RELU) {
    y = x < 0.0f ? 0.0f : x;
    slope = x <= 0.0f ? 0.0f : 1.0f;
  } else if constexpr (ACT == ACT_SILU) {
    float s = sigmoid(x);
    y = x * s;
    slope = s + x * s * (1.0f - s);
  } else if constexpr (ACT == ACT_TANH) {
    y = tanhf(x);
    slope = tanh_grad(x);
  } else {
    y = x;
    slope = 1.0f;
  }
}
__device__ __forceinline__ float act_of(float x) {
  float y, slope;
  act_both(x, y, slope);
  return y;
}
__device__ __forceinline__ float act_grad(float x) {
  float y, slope;
  act_both(x, y, slope);
  return slope;
}
