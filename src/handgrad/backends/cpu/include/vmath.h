// exp and activation functions as straight-line float code, so that `omp simd` loops over them vectorise; loops over
// libm calls do not.
// The compiler fuses a * b + c where the instruction set has FMA. tests/test_vmath.py measures the errors stated here,
// against float64.
#pragma once
#include "kernel.h"

// e^x within 1.1 ulp; 0 below -87.3, +inf above 88.7, NaN kept. Cody-Waite reduction, degree-6 polynomial.
static inline float vexp(float x) {
  float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it leaves n = round(x / ln 2) in the low bits
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact when multiplied by n
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  union { float f; uint32_t u; } scale = {.f = shifted}, y = {.f = p};
  y.u += scale.u << 23;  // times 2^n, by adding to the exponent
  y.f = x < -87.33654f ? 0.0f : y.f;
  return x <= 88.72283f ? y.f : x + INFINITY;  // the sum keeps a NaN
}

#define GELU_K 0.7978845608f  // sqrt(2 / pi)
#define GELU_C 0.044715f

// GPT-2's GELU, x (1 + tanh(u)) / 2 with u = K (x + C x^3) (Hendrycks & Gimpel 2016), written x / (1 + e^-2u): the same
// function without the cancellation of 1 + tanh. Error at most 1.5e-7 of max(1, |gelu|); 0 for large negative x.
static inline float vgelu(float x) {
  return x / (1.0f + vexp(-2.0f * GELU_K * x * (GELU_C * x * x + 1.0f)));
}

// d gelu / dx = s + x s (1 - s) 2u' with s = 1 / (1 + e^-2u) and 1 - s = e^-2u s. Beyond |x| = 10 it is 0 or 1, and
// the clamp keeps u' and e^-2u finite. Absolute error at most 2.5e-7.
static inline float vgelu_grad(float x) {
  x = x > 10.0f ? 10.0f : x;
  x = x < -10.0f ? -10.0f : x;
  float e = vexp(-2.0f * GELU_K * x * (GELU_C * x * x + 1.0f));
  float s = 1.0f / (1.0f + e);
  return s + x * (e * s * s) * (2.0f * GELU_K) * (3.0f * GELU_C * x * x + 1.0f);
}

// erf as the normal distribution, (1 + erf(x / sqrt(2))) / 2, given e = e^(-x^2 / 2). For x < 0 it is e R(|x|), where R
// falls slowly: t times a polynomial in t = 1 / (1 + 0.35 |x|), a minimax fit with a relative error of 1.8e-8. So
// negative x do not cancel. Absolute error at most 2.5e-7, relative error at most 1.2e-6 for x >= -5 (x^2 is rounded).
static inline float vnormal_cdf_of(float x, float e) {
  float t = 1.0f / (1.0f + 0.35f * fabsf(x));
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
static inline float vnormal_cdf(float x) { return vnormal_cdf_of(x, vexp(-0.5f * x * x)); }

// The GELU of BERT, x (1 + erf(x / sqrt(2))) / 2. Error at most 1.5e-7 of max(1, |gelu|).
static inline float vgelu_erf(float x) { return x * vnormal_cdf(x); }

// Its derivative: the distribution plus x times its density. Absolute error at most 2.5e-7.
static inline float vgelu_erf_grad(float x) {
  float e = vexp(-0.5f * x * x);
  return vnormal_cdf_of(x, e) + x * e * 0.3989422804f;  // 1 / sqrt(2 pi)
}

// x / (1 + e^-x). Relative error at most 3e-7 for x > -87; 0 for large negative x.
static inline float vsilu(float x) { return x / (1.0f + vexp(-x)); }

// s + x s (1 - s) with s = 1 / (1 + e^-x). The clamp keeps e^-x finite. Absolute error at most 2.5e-7.
static inline float vsilu_grad(float x) {
  x = x > 80.0f ? 80.0f : x;
  x = x < -80.0f ? -80.0f : x;
  float e = vexp(-x), s = 1.0f / (1.0f + e);
  return s + x * (e * s * s);
}

// sign(x) (1 - 2 / (1 + e^2|x|)); below 0.6, where that cancels, x + x^3 times a minimax polynomial in x^2. Relative
// error at most 2.5e-7.
static inline float vtanh(float x) {
  float z = x * x, a = fabsf(x);
  float p = 0.0154383033f;
  p = p * z - 0.0520786282f;
  p = p * z + 0.133098793f;
  p = p * z - 0.333323503f;
  float large = copysignf(1.0f - 2.0f / (1.0f + vexp(2.0f * a)), x);
  return a < 0.6f ? x + x * z * p : large;
}

// 1 - tanh^2 = 4 e / (1 + e)^2 with e = e^-2|x|, which does not cancel. Relative error at most 5e-7 for |x| < 43.
static inline float vtanh_grad(float x) {
  float e = vexp(-2.0f * fabsf(x)), s = 1.0f / (1.0f + e);
  return 4.0f * e * s * s;
}

// The numbers of ops/act.py; a test compares them.
enum { ACT_NONE, ACT_GELU_TANH, ACT_GELU_ERF, ACT_RELU, ACT_SILU, ACT_TANH };

// An activation function and its derivative. Loops over them vectorise where act is a constant, as in EACH_ACT.
static inline __attribute__((always_inline)) float vact(float x, const int act) {
  switch (act) {
    case ACT_GELU_TANH: return vgelu(x);
    case ACT_GELU_ERF: return vgelu_erf(x);
    case ACT_RELU: return x < 0.0f ? 0.0f : x;
    case ACT_SILU: return vsilu(x);
    case ACT_TANH: return vtanh(x);
    default: return x;
  }
}
static inline __attribute__((always_inline)) float vact_grad(float x, const int act) {
  switch (act) {
    case ACT_GELU_TANH: return vgelu_grad(x);
    case ACT_GELU_ERF: return vgelu_erf_grad(x);
    case ACT_RELU: return x <= 0.0f ? 0.0f : 1.0f;
    case ACT_SILU: return vsilu_grad(x);
    case ACT_TANH: return vtanh_grad(x);
    default: return 1.0f;
  }
}

// f(..., act), an always_inline function, called with act a constant.
#define EACH_ACT(act, f, ...)                                 \
  switch (act) {                                              \
    case ACT_GELU_TANH: f(__VA_ARGS__, ACT_GELU_TANH); break; \
    case ACT_GELU_ERF: f(__VA_ARGS__, ACT_GELU_ERF); break;   \
    case ACT_RELU: f(__VA_ARGS__, ACT_RELU); break;           \
    case ACT_SILU: f(__VA_ARGS__, ACT_SILU); break;           \
    case ACT_TANH: f(__VA_ARGS__, ACT_TANH); break;           \
    default: f(__VA_ARGS__, ACT_NONE);                        \
  }
