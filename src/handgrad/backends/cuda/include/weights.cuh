// The weights of an update, for every op that makes one: 4 at a time, float32 in registers, and in memory what the working
// dtype holds. In bf16 the lower halves are in `low`, or without it weights round stochastically (ops/adamw/README.md §5).
#pragma once
#include "kernel.cuh"

// -DVEC  4; 1 where n is not a multiple of 4
// -DLOW  1 where low is given
#if !defined(VEC) || !defined(LOW)
#error "ops/updates.py defines these"
#endif

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

__device__ __forceinline__ bf16 bits_to_bf16(u32 bits) { return from_float<bf16>(__uint_as_float(bits << 16)); }

// Stochastic rounding: the upper neighbour with the probability that the 16 truncated bits give, so the mean is exact.
__device__ __forceinline__ bf16 round_stochastically(float x, u32 draw) {
  u32 bits = __float_as_uint(x);
  bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? bits_to_bf16((bits + (draw & 0xffffu)) >> 16) : from_float<bf16>(x);
}

// A float32 weight in two halves: its nearest bf16, ties away from zero, and a signed remainder of 16 bits.
__device__ __forceinline__ bf16 split_weight(float weight, short *low) {
  u32 bits = __float_as_uint(weight);
  *low = (short)(u16)bits;
  return bits_to_bf16((bits + 0x8000u) >> 16);
}
__device__ __forceinline__ float join_weight(bf16 high, short low) {
  return __uint_as_float(__float_as_uint(to_float(high)) + (u32)(int)low);
}

// The random bits of 4 elements of the flat order of all parameters, the first of which is `first`. Streams: the last ones
// of the 2^16 numbers of random calls.
#define WEIGHT_STREAM ((u64)0xFFFF << 48)
struct Draws {
  u64 key = 0, stream = 0;
  __device__ __forceinline__ Draws() {}  // of weights that are only read
  __device__ __forceinline__ Draws(const StepScalars *scalars, u64 number)
      : key(scalars->seed), stream(number ^ (u64)scalars->step) {}
  __device__ __forceinline__ uint4 operator()(i64 first) const { return philox((u64)first / 4, stream, key); }
};

// Weights i .. i + 3 of a slice of n. start: of the slice in the flat order of all parameters.
struct Weights {
  Pack<real, 4> high;
#if LOW
  Pack<short, 4> rest;
#elif HG_BF16
  uint4 draw;
#endif
  __device__ __forceinline__ Weights(const real *p, const short *low, i64 i, i64 n, i64 start, const Draws &draws)
      : high(read(p, i, n)) {
#if LOW
    rest = read(low, i, n);
#elif HG_BF16
    draw = draws(start + i);
#endif
  }
  __device__ __forceinline__ float at(int k) const {
#if LOW
    return join_weight(high.v[k], rest.v[k]);
#else
    return high.at(k);
#endif
  }
  __device__ __forceinline__ void set(int k, float weight) {
#if LOW
    high.v[k] = split_weight(weight, &rest.v[k]);
#elif HG_BF16
    high.v[k] = round_stochastically(weight, k == 0 ? draw.x : k == 1 ? draw.y : k == 2 ? draw.z : draw.w);
#else
    high.v[k] = weight;
#endif
  }
  __device__ __forceinline__ void write_to(real *p, short *low, i64 i, i64 n) const {
#if LOW
    write(low, rest, i, n);
#endif
    if constexpr (VEC == 4) store(p + i, high);  // the next forward reads it
    else write(p, high, i, n);
  }
};
