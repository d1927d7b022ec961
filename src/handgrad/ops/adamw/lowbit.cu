// adamw_bf16, adamw_int8: adamw with moments of 2 bytes, or of 1 and a scale per block              math: README.md §2
// writes =  p: (n) dtype;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
//           m, v: (n) bf16, or codes of 8 bits with their scales: (n / 128) f32
// numerics  f32; bias corrections in double;  moments round stochastically, README.md §5
// layout    one pass by a grid that fills the GPU; a thread takes 4 elements, so that a warp has the 128 of a scale
// source    own work; README.md §9
#include "rule.cuh"

#define MOMENT_STREAM ((u64)0xFFFE << 48)  // of random calls, the one before that of weights
#define SHARED 128                         // elements that share a scale
typedef unsigned char code_t;

__device__ __forceinline__ u32 lane_of(const uint4 &x, int k) { return k == 0 ? x.x : k == 1 ? x.y : k == 2 ? x.z : x.w; }

KERNEL __launch_bounds__(THREADS, HELD)
adamw_bf16_kernel(real *__restrict__ p,                                         // (n)
                  bf16 *__restrict__ m, bf16 *__restrict__ v,                   // (n)
                  short *__restrict__ low,                                      // (n) or NULL
                  const grad_t *__restrict__ grad, const StepScalars *scalars,  // (n)
                  i64 n, i64 start, float eps, float weight_decay) {  // start: of the slice in the flat vector, elements
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  const Rule rule(scalars, eps, weight_decay);
  const Draws draws(scalars, WEIGHT_STREAM), moment_draws(scalars, MOMENT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<bf16, 4> mean = read(m, i, n), square = read(v, i, n);
    Weights weight(p, low, i, n, start, draws);
    const uint4 bits = moment_draws(start + i);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float first = mean.at(k), second = square.at(k);
      weight.set(k, rule.update(weight.at(k), first, second, g.at(k)));
      mean.v[k] = round_stochastically(first, lane_of(bits, k));
      square.v[k] = round_stochastically(second, lane_of(bits, k) >> 16);
    }
    write(m, mean, i, n);
    write(v, square, i, n);
    weight.write_to(p, low, i, n);
  }
}

// A moment is scale * q^power / top^power: 7 bits and a sign squared for m, 8 bits to the fourth power for v.
__device__ __forceinline__ float decode_first(code_t code, float scale) {
  float q = (float)(code & 127);
  return (code & 128 ? -scale : scale) * (q * q / 16129.0f);
}
__device__ __forceinline__ float decode_second(code_t code, float scale) {
  float q = (float)code;
  return scale * (q * q * q * q / 4228250625.0f);
}

// x as a fraction of the scale, rounded stochastically between neighbouring codes: the mean of what is decoded is x.
__device__ __forceinline__ code_t encode_first(float x, float scale, u32 bits) {
  float a = scale > 0.0f ? fabsf(x) / scale : 0.0f, q = fminf(floorf(127.0f * sqrtf(a)), 127.0f);
  float chance = (a * 16129.0f - q * q) / ((q + 1.0f) * (q + 1.0f) - q * q);
  q = fminf(q + ((float)(bits & 0xffffu) * 0x1p-16f < chance ? 1.0f : 0.0f), 127.0f);
  return (code_t)((int)q + (x < 0.0f ? 128 : 0));
}
__device__ __forceinline__ code_t encode_second(float x, float scale, u32 bits) {
  float a = scale > 0.0f ? x / scale : 0.0f, q = fminf(floorf(255.0f * sqrtf(sqrtf(a))), 255.0f), next = q + 1.0f;
  float power = q * q * q * q, chance = (a * 4228250625.0f - power) / (next * next * next * next - power);
  q = fminf(q + ((float)(bits >> 16) * 0x1p-16f < chance ? 1.0f : 0.0f), 255.0f);
  return (code_t)(x > 0.0f ? fmaxf(q, 1.0f) : 0.0f);  // above 0 stays above 0: m is divided by its root
}

KERNEL __launch_bounds__(THREADS, HELD)
adamw_int8_kernel(real *__restrict__ p,                                            // (n)
                  code_t *__restrict__ m, code_t *__restrict__ v,                  // (n)
                  float *__restrict__ m_scale, float *__restrict__ v_scale,        // (n / SHARED)
                  short *__restrict__ low,                                         // (n) or NULL
                  const grad_t *__restrict__ grad, const StepScalars *scalars,     // (n)
                  i64 n, i64 start, float eps, float weight_decay) {  // start: of the slice in the flat vector, elements
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  const Rule rule(scalars, eps, weight_decay);
  const Draws draws(scalars, WEIGHT_STREAM), moment_draws(scalars, MOMENT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<code_t, 4> mean = read(m, i, n), square = read(v, i, n);
    Weights weight(p, low, i, n, start, draws);
    const uint4 bits = moment_draws(start + i);
    float first[4], second[4], most1 = 0.0f, most2 = 0.0f;
    const float scale1 = m_scale[i / SHARED], scale2 = v_scale[i / SHARED];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      first[k] = decode_first(mean.v[k], scale1);
      second[k] = decode_second(square.v[k], scale2);
      weight.set(k, rule.update(weight.at(k), first[k], second[k], g.at(k)));
      most1 = fmaxf(most1, fabsf(first[k]));
      most2 = fmaxf(most2, second[k]);
    }
    most1 = warp_reduce(most1, Max());  // n and the grid's stride are multiples of SHARED: a warp is in one block, or out
    most2 = warp_reduce(most2, Max());
#pragma unroll
    for (int k = 0; k < 4; k++) {
      mean.v[k] = encode_first(first[k], most1, lane_of(bits, k));
      square.v[k] = encode_second(second[k], most2, lane_of(bits, k));
    }
    write(m, mean, i, n);
    write(v, square, i, n);
    weight.write_to(p, low, i, n);
    if (threadIdx.x % 32 == 0) {
      m_scale[i / SHARED] = most1;
      v_scale[i / SHARED] = most2;
    }
  }
}
