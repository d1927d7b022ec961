// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; bias corrections in double;  bf16 without low: stochastic rounding, README.md §5
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// speed     H100 80GB, GPT-2 124M in 26 buckets, bf16, in a traced step, 2026-11-24: 2.25 TB/s (75 % of the copy rate)
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "kernel.cuh"

// -DVEC            4; 1 where n is not a multiple of 4
// -DLOW            1 where low is given
// -DTHREADS -DHELD  threads of a block; blocks per SM
// -DBETA1 -DBETA2  doubles: 1 - 0.999f would be wrong by 1e-5
#if !defined(VEC) || !defined(LOW) || !defined(THREADS) || !defined(HELD) || !defined(BETA1) || !defined(BETA2)
#error "adamw/op.py defines these"
#endif
#define WEIGHT_STREAM ((u64)0xFFFF << 48)  // the last of the 2^16 numbers of random calls

// 4 elements from `i` on; those past n are zero and are not written.
template <class T> __device__ __forceinline__ Pack<T, 4> read(const T *from, i64 i, i64 n) {
  Pack<T, 4> x = {};
  if constexpr (VEC == 4) x = load_streaming<T, 4>(from + i);
  else
    for (int k = 0; k < 4; k++)
      if (i + k < n) x.v[k] = from[i + k];
  return x;
}
template <class T> __device__ __forceinline__ void write(T *to, const Pack<T, 4> &x, i64 i, i64 n) {
  if constexpr (VEC == 4) store_streaming(to + i, x);
  else
    for (int k = 0; k < 4; k++)
      if (i + k < n) to[i + k] = x.v[k];
}

#if HG_BF16
__device__ __forceinline__ bf16 bits_to_bf16(u32 bits) { return from_float<bf16>(__uint_as_float(bits << 16)); }

// A float32 weight in two halves: its nearest bf16, ties away from zero, and a signed remainder of 16 bits.
__device__ __forceinline__ bf16 split_weight(float weight, short *low) {
  u32 bits = __float_as_uint(weight);
  *low = (short)(u16)bits;
  return bits_to_bf16((bits + 0x8000u) >> 16);
}
__device__ __forceinline__ float join_weight(bf16 high, short low) {
  return __uint_as_float(__float_as_uint(to_float(high)) + (u32)(int)low);
}
// Stochastic rounding: the upper neighbour with the probability that the 16 truncated bits give, so the mean is exact.
__device__ __forceinline__ bf16 round_weight(float weight, u32 draw) {
  u32 bits = __float_as_uint(weight);
  bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? bits_to_bf16((bits + (draw & 0xffffu)) >> 16) : from_float<bf16>(weight);
}
#endif

KERNEL __launch_bounds__(THREADS, HELD)
adamw_kernel(real *__restrict__ p,                              // (n)
             float *__restrict__ m, float *__restrict__ v,      // (n)
             short *__restrict__ low,                           // (n) or NULL
             const grad_t *__restrict__ grad, const StepScalars *scalars,  // (n)
             i64 n, i64 start, float eps, float weight_decay) {  // start: of the bucket in the flat vector, elements
  __shared__ float rates[2];
  const float scale = scalars->grad_scale;
  if (scale == 0.0f) return;  // the gradients are not finite
  if (threadIdx.x == 0) rates[0] = (float)((double)scalars->lr / (1.0 - pow(BETA1, (double)scalars->step)));
  if (threadIdx.x == 32) rates[1] = (float)(1.0 / sqrt(1.0 - pow(BETA2, (double)scalars->step)));
  __syncthreads();
  const float rate = rates[0], root = rates[1], shrink = (float)(1.0 - (double)scalars->lr * (double)weight_decay);
  const float keep1 = (float)BETA1, take1 = (float)(1.0 - BETA1), keep2 = (float)BETA2, take2 = (float)(1.0 - BETA2);
#if HG_BF16 && !LOW
  const u64 key = scalars->seed, stream = WEIGHT_STREAM ^ (u64)scalars->step;
#endif
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<float, 4> first = read(m, i, n), second = read(v, i, n);
    Pack<real, 4> weight = read(p, i, n);
#if LOW
    Pack<short, 4> rest = read(low, i, n);
#elif HG_BF16
    const uint4 bits = philox((u64)(start + i) / 4, stream, key);
    const u32 draw[4] = {bits.x, bits.y, bits.z, bits.w};
#endif
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float d = g.at(k) * scale;
      first.v[k] = keep1 * first.v[k] + take1 * d;
      second.v[k] = keep2 * second.v[k] + take2 * (d * d);
      float step = rate * (first.v[k] / (sqrtf(second.v[k]) * root + eps));
#if LOW
      weight.v[k] = split_weight(shrink * join_weight(weight.v[k], rest.v[k]) - step, &rest.v[k]);
#elif HG_BF16
      weight.v[k] = round_weight(shrink * weight.at(k) - step, draw[k]);
#else
      weight.v[k] = shrink * weight.v[k] - step;
#endif
    }
    write(m, first, i, n);
    write(v, second, i, n);
#if LOW
    write(low, rest, i, n);
#endif
    if constexpr (VEC == 4) store(p + i, weight);  // the next forward reads it
    else write(p, weight, i, n);
  }
}
