// Every kernel file includes this: element types, 16-byte accesses, reductions, StepScalars, the random generator.
//
// A file is compiled at run time for one architecture, one element type and one set of sizes:
//   -DHG_BF16=0|1       `real` is the type of activations and parameters; sums and statistics are always float
//   -DHG_GRAD_BF16=0|1  `grad_t` is the type of parameter gradients
//   -DNAME=value        what the op declares in `defines`
// Inline PTX is in ptx.cuh and ptx_sm90a.cuh alone, so that tests can compile kernels without the latter for the host
// (HG_HOST, tests/emulator).
#pragma once
#if !defined(HG_BF16) || !defined(HG_GRAD_BF16)
#error "launch.py defines HG_BF16 and HG_GRAD_BF16"
#endif
#ifdef HG_HOST
#include "emulator.h"
#else
#include <cuda_bf16.h>
#define HG_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  type *name = (type *)name##_raw
#endif
#define KERNEL extern "C" __global__ void

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef __nv_bfloat16 bf16;

#define HG_INF __int_as_float(0x7f800000)

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) {  // to nearest, ties to even
  return __float2bfloat16(v);
}

#if HG_BF16
typedef bf16 real;
#else
typedef float real;
#endif
#if HG_GRAD_BF16
typedef bf16 grad_t;
#else
typedef float grad_t;
#endif

// n values of T, accessed at once, 16 bytes at most; addresses are multiples of the size.
template <class T, int n> struct alignas(sizeof(T) * n) Pack {
  T v[n];
  __device__ __forceinline__ float at(int i) const { return to_float(v[i]); }
  __device__ __forceinline__ void set(int i, float f) { v[i] = from_float<T>(f); }
};
template <class T, int n> __device__ __forceinline__ Pack<T, n> load(const T *p) { return *(const Pack<T, n> *)p; }
template <class T, int n> __device__ __forceinline__ void store(T *p, const Pack<T, n> &x) {
  if constexpr (sizeof(x) % 16 == 0) {  // explicit: the compiler sometimes splits a plain copy into smaller ones
#pragma unroll
    for (int i = 0; i < (int)sizeof(x) / 16; i++) ((int4 *)p)[i] = ((const int4 *)&x)[i];
  } else {
    *(Pack<T, n> *)p = x;
  }
}
// The same for data that no kernel reads again soon: caches evict it first.
template <class T, int n> __device__ __forceinline__ Pack<T, n> load_streaming(const T *p) {
  Pack<T, n> x;
  if constexpr (sizeof(x) == 16) *(int4 *)&x = __ldcs((const int4 *)p);
  else x = *(const Pack<T, n> *)p;
  return x;
}
template <class T, int n> __device__ __forceinline__ void store_streaming(T *p, const Pack<T, n> &x) {
  if constexpr (sizeof(x) == 16) __stcs((int4 *)p, *(const int4 *)&x);
  else *(Pack<T, n> *)p = x;
}

struct Sum { __device__ __forceinline__ float operator()(float a, float b) const { return a + b; } };
struct Max { __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); } };

// The same value in all 32 lanes, reduced in a fixed order.
template <class Op> __device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// The same value in all threads of a block of `threads` (a multiple of 32). buffer: threads / 32 shared floats.
template <int threads, class Op>
__device__ __forceinline__ float block_reduce(float x, Op op, float identity, float *buffer) {
  x = warp_reduce(x, op);
  __syncthreads();  // the previous reduction may still read the buffer
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < threads / 32 ? buffer[threadIdx.x % 32] : identity;
  return warp_reduce(x, op);
}

// The scalars that change from step to step, with the layout of core/scalars.py; a test compares the two.
struct StepScalars {
  u64 seed;            // of dropout and of stochastic rounding
  i64 step;            // optimizer step, counted from 1
  i64 state_since;     // steps before the optimizer's state began anew; 0: none
  i64 micro_step;      // index of the micro-batch in its step: a counter of dropout
  i64 position;        // decode: tokens already in the cache
  float lr;            // learning rate of this step
  float loss_scale;    // 1 / (targets that count in the whole step)
  double momentum;     // momentum of this step, for optimizers that schedule it
  double loss_sum;     // out: sum of the losses of the step's micro-batches, nats
  float grad_norm;     // out: global L2 norm of the gradients
  float grad_scale;    // out: clip factor that the optimizer applies; 0: no update, the gradients are not finite
  u64 exposed_ns;      // out: nanoseconds that computation has waited for other ranks, in all steps so far
};

// Philox4x32-10 (Salmon et al., SC 2011): the same bits for the same counter on every backend.
__device__ __forceinline__ uint4 philox(u64 low, u64 high, u64 key) {
  u32 c0 = (u32)low, c1 = (u32)(low >> 32), c2 = (u32)high, c3 = (u32)(high >> 32);
  u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0, h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c2 = h0 ^ c3 ^ k1;
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Dropout: element i of random call `stream` is kept and scaled if its 32 random bits are >= threshold.
// Key: the seed. Counter: (i / 4, stream, micro_step, step). Lane: i % 4.
struct DropoutRule {
  u64 key, stream;
  u32 threshold;
  float scale;
  __device__ __forceinline__ DropoutRule(const StepScalars *scalars, float p, i64 call)
      : key(scalars->seed), stream((u64)call << 48 ^ (u64)scalars->micro_step << 32 ^ (u64)scalars->step),
        threshold((u32)((double)p * 4294967296.0)), scale(1.0f / (1.0f - p)) {}
  // Of elements 4 quad .. 4 quad + 3.
  __device__ __forceinline__ uint4 bits(i64 quad) const { return philox((u64)quad, stream, key); }
  __device__ __forceinline__ float factor(u32 bits) const { return bits >= threshold ? scale : 0.0f; }
};
