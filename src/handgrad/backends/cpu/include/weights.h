// The weights of an update, for every op that makes one: a kernel reads and writes float32, block by block, and p keeps
// what the working dtype can hold. In bf16 the lower halves are in `low`, or without it weights round stochastically
// (ops/adamw/README.md §5).
#pragma once
#include "philox.h"

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver pow,pow@GLIBC_2.2.5");  // the newer version differs in errno alone, and needs glibc 2.29
#endif

#define WEIGHTS 512  // of a block: random bits stay in L1; every block of every vector starts on a cache line
#define WEIGHT_STREAM ((uint64_t)0xFFFF << 48)  // the last of the 2^16 numbers of random calls

// bits (n, rounded up to 4): the random bits of elements first .. first + n - 1 of a stream; `first` is a multiple of 4.
static inline void draw_bits(uint32_t *restrict bits, int64_t first, int64_t n, uint64_t stream,
                             const StepScalars *scalars) {
#pragma omp simd
  for (int64_t quad = 0; quad < (n + 3) / 4; quad++) {
    philox4 r = philox((uint64_t)(first / 4 + quad), stream ^ (uint64_t)scalars->step, scalars->seed);
    for (int lane = 0; lane < 4; lane++) bits[4 * quad + lane] = r.v[lane];
  }
}

// x rounded to bf16: up with the probability that its low 16 bits are of 2^16. bits: 16 random ones, the others are ignored.
static inline bf16 round_stochastically(float f, uint32_t bits) {
  union { float f; uint32_t u; } x = {.f = f};
  uint32_t rounded = (x.u + (bits & 0xffffu)) >> 16;
  return (x.u & 0x7f800000u) == 0x7f800000u ? float_to_bf16(f) : (bf16)rounded;
}

// Returns n <= WEIGHTS weights as float32: p itself, or in bf16 what p and low (or NULL) hold, in `buffer`.
static inline float *load_weights(float *restrict buffer, real *restrict p, const int16_t *restrict low, int64_t n) {
#if HG_BF16
  if (low) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = join_weight(p[i], low[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = load(p[i]);
  }
  return buffer;
#else
  (void)buffer, (void)low, (void)n;
  return p;
#endif
}

// Stores what load_weights returned. first: their place in the flat order of all parameters, a multiple of 4.
static inline void store_weights(real *restrict p, int16_t *restrict low, const float *restrict weight, int64_t first,
                                 int64_t n, const StepScalars *scalars) {
#if HG_BF16
  if (low) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = split_weight(weight[i], low + i);
    return;
  }
  uint32_t bits[WEIGHTS];
  draw_bits(bits, first, n, WEIGHT_STREAM, scalars);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) p[i] = round_stochastically(weight[i], bits[i]);
#else
  (void)p, (void)low, (void)weight, (void)first, (void)n, (void)scalars;
#endif
}
