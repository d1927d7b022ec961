// What kernel.cuh and ptx.cuh need from CUDA, for the host: kernels run as plain C++, a fibre a thread (runtime.cc).
//
// Barriers and warp collectives switch fibres. Whatever the hardware leaves undefined and can be seen here ends the
// launch with a message: see runtime.cc.
#pragma once
#include <stdint.h>
#include <string.h>

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __constant__ const
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define HG_SHARED(type, name) type *name = (type *)emulator::dynamic_shared

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;  // set at every switch
constexpr int warpSize = 32;

// The runtime --------------------------------------------------------------------------------------------------------

// Where a collective stands in the source: threads that meet must meet at the same place.
#define HG_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulator {
enum Kind { SYNC, SHUFFLE, BALLOT, LOAD_MATRIX, LOAD_MATRIX_TRANSPOSED, MMA };
// What a lane brings to a collective, and what it takes away.
struct Meeting {
  Kind kind;
  unsigned mask;  // lanes that take part
  const char *file;
  int line;
  uint64_t value = 0;  // shuffle: own value; ballot: predicate
  int from = 0;        // shuffle: lane whose value is wanted
  const void *row = nullptr;  // load_matrix
  unsigned *r = nullptr;
  float *d = nullptr;  // mma
  const unsigned *a = nullptr;
  unsigned b0 = 0, b1 = 0;
};
extern unsigned char *dynamic_shared;
void meet(Meeting &m);  // returns when all lanes of the mask have come; value and registers are the results then
void barrier(const char *file, int line);
void copy(void *shared, const void *global, bool valid, const char *file, int line);
void commit();
void wait(int pending);

template <class T> inline T shuffle(unsigned mask, T v, int from, const char *file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  Meeting m = {SHUFFLE, mask, file, line, 0, from};
  memcpy(&m.value, &v, sizeof(T));
  meet(m);
  memcpy(&v, &m.value, sizeof(T));
  return v;
}
inline unsigned ballot(unsigned mask, bool v, const char *file, int line) {
  Meeting m = {BALLOT, mask, file, line, v};
  meet(m);
  return (unsigned)m.value;
}
inline int lane() { return threadIdx.x % 32; }
inline int inside(int from, int width, int other) { return from / width == lane() / width && from >= 0 ? from : other; }

#ifndef EMULATOR_RUNTIME
// The static shared memory of this file is all that its library keeps in .bss: it is poisoned before each block.
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];
extern "C" __attribute__((visibility("default"))) void emulator_static_shared(unsigned char **start, uint64_t *size) {
  *start = __bss_start;
  *size = (uint64_t)(_end - __bss_start);
}
#endif
}  // namespace emulator

static inline void __syncthreads(HG_AT) { emulator::barrier(file, line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, HG_AT) {
  emulator::Meeting m = {emulator::SYNC, mask, file, line};
  emulator::meet(m);
}
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, HG_AT) {
  return emulator::shuffle(mask, v, emulator::lane() / width * width + (from & (width - 1)), file, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, HG_AT) {
  int from = emulator::inside(emulator::lane() ^ lanes, width, emulator::lane());
  return emulator::shuffle(mask, v, from, file, line);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned lanes, int width = 32, HG_AT) {
  int from = emulator::inside(emulator::lane() + (int)lanes, width, emulator::lane());
  return emulator::shuffle(mask, v, from, file, line);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned lanes, int width = 32, HG_AT) {
  int from = emulator::inside(emulator::lane() - (int)lanes, width, emulator::lane());
  return emulator::shuffle(mask, v, from, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int v, HG_AT) { return emulator::ballot(mask, v, file, line); }
static inline int __any_sync(unsigned mask, int v, HG_AT) { return emulator::ballot(mask, v, file, line) != 0; }
static inline int __all_sync(unsigned mask, int v, HG_AT) { return emulator::ballot(mask, v, file, line) == mask; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// Memory and bits ----------------------------------------------------------------------------------------------------

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }
template <class T> static inline void __stcg(T *p, T v) { *p = v; }

template <class T> static inline T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; *p = old > v ? old : v; return old; }
template <class T> static inline T atomicMin(T *p, T v) { T old = *p; *p = old < v ? old : v; return old; }
template <class T> static inline T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <class T> static inline T atomicCAS(T *p, T is, T v) { T old = *p; *p = old == is ? v : old; return old; }

template <class To, class From> static inline To emulator_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &v, sizeof(to));
  return to;
}
static inline float __int_as_float(int v) { return emulator_bits<float>(v); }
static inline int __float_as_int(float v) { return emulator_bits<int>(v); }
static inline float __uint_as_float(unsigned v) { return emulator_bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return emulator_bits<unsigned>(v); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
// Fibres run one at a time.
static inline int atomicMin(int *p, int v) { int old = *p; *p = v < old ? v : old; return old; }
static inline int atomicMax(int *p, int v) { int old = *p; *p = v > old ? v : old; return old; }

// Arithmetic ---------------------------------------------------------------------------------------------------------

// <math.h> takes longer to compile than a kernel does.
extern "C" {
float expf(float), exp2f(float), expm1f(float), logf(float), log2f(float), log1pf(float), powf(float, float);
float sqrtf(float), fabsf(float), fmaxf(float, float), fminf(float, float), fmaf(float, float, float), tanhf(float);
float floorf(float), ceilf(float), rintf(float), roundf(float), truncf(float), erff(float), ldexpf(float, int);
double exp(double), log(double), sqrt(double), pow(double, double), floor(double);
}
static inline bool isnan(float x) { return x != x; }
static inline bool isinf(float x) { return fabsf(x) == __builtin_inff(); }
static inline bool isfinite(float x) { return fabsf(x) < __builtin_inff(); }
static inline int abs(int x) { return x < 0 ? -x : x; }
template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// bf16: nearest, ties to even; a NaN stays one.
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) {
    unsigned u = __float_as_uint(v);
    bits = v != v ? 0x7fff : (unsigned short)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
static inline float __bfloat162float(__nv_bfloat16 v) { return (float)v; }
static inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
static inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return emulator_bits<__nv_bfloat16>(v); }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }
static inline float __low2float(__nv_bfloat162 v) { return (float)v.x; }
static inline float __high2float(__nv_bfloat162 v) { return (float)v.y; }

// ptx.cuh ------------------------------------------------------------------------------------------------------------

static inline void load_matrix(unsigned r[4], const void *row, HG_AT) {
  emulator::Meeting m = {emulator::LOAD_MATRIX, 0xffffffffu, file, line, 0, 0, row, r};
  emulator::meet(m);
}
static inline void load_matrix_transposed(unsigned r[4], const void *row, HG_AT) {
  emulator::Meeting m = {emulator::LOAD_MATRIX_TRANSPOSED, 0xffffffffu, file, line, 0, 0, row, r};
  emulator::meet(m);
}
static inline void mma_bf16(float d[4], const unsigned a[4], unsigned b0, unsigned b1, HG_AT) {
  emulator::Meeting m = {emulator::MMA, 0xffffffffu, file, line, 0, 0, 0, 0, d, a, b0, b1};
  emulator::meet(m);
}
static inline void copy_async(void *shared, const void *global, bool valid = true, HG_AT) {
  emulator::copy(shared, global, valid, file, line);
}
static inline void copy_async_streaming(void *shared, const void *global, HG_AT) {
  emulator::copy(shared, global, true, file, line);
}
static inline void copy_async_commit() { emulator::commit(); }
template <int pending> static inline void copy_async_wait() { emulator::wait(pending); }
template <int = 0> static inline unsigned long long nanoseconds() { return 0; }
template <int = 0> static inline float exp2_fast(float x) {  // templates give way to a host version in ptx.cuh
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
template <int = 0> static inline unsigned pack_bf16(float low, float high) {
  return __nv_bfloat16(low).bits | (unsigned)__nv_bfloat16(high).bits << 16;
}
