// exp, tanh and GELU as straight-line float code, so that `omp simd` loops over them vectorise; loops over libm calls
// do not. The compiler fuses a * b + c where the instruction set has FMA. tests/test_vmath.py measures the errors stated
// here, against float64.
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

// tanh within 3 ulp; NaN kept. Below 1 by five levels of Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / ...));
// above 1, 1 - 2 / (e^2x + 1) cancels nothing.
static inline float vtanh(float x) {
  float size = fabsf(x), q = x * x;
  float low = size * (945.0f + q * (105.0f + q)) / (945.0f + q * (420.0f + 15.0f * q));
  float high = 1.0f - 2.0f / (vexp(2.0f * size) + 1.0f);
  return copysignf(size < 1.0f ? low : high, x);
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
