// Every cpu.c includes this first: the element type, the instruction set, and how a kernel is called.
//
// A file is compiled once per element type and instruction set:
//   -DHG_DTYPE=f32|bf16     `real` is the type of activations and parameters; sums, statistics and gradients of
//                           parameters are always float
//   -DHG_ISA=portable|avx2|avx512|avx512bf16    only a name here; setup.py passes the matching -m flags
// So plain loops over `load` and `store` compile to vector code, and no kernel mentions a dtype.
//
// A kernel is called through ENTRY(name) with a pointer `a` to its arguments: the struct name_args of arguments.h,
// which setup.py generates from the op's declaration. All members are 8 bytes; an absent optional tensor is NULL.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
static inline int hg_thread(void) { return omp_get_thread_num(); }
static inline int hg_num_threads(void) { return omp_get_num_threads(); }  // of this parallel region
static inline int hg_max_threads(void) { return omp_get_max_threads(); }  // of the next parallel region
#else
static inline int hg_thread(void) { return 0; }
static inline int hg_num_threads(void) { return 1; }
static inline int hg_max_threads(void) { return 1; }
#endif

#include "arguments.h"

typedef struct { void (*fn)(const void *); const void *args; } Entry;

#define HG_PASTE3(x, y, z) x##_##y##_##z
#define HG_NAME(x, y, z) HG_PASTE3(x, y, z)
#define KERNEL(name) HG_NAME(name, HG_DTYPE, HG_ISA)  // linear_forward -> linear_forward_bf16_avx512
// The lanes that the vector `at` names: of x from 0 on, then of y. clang lacks gcc's builtin, but makes a shuffle of this
// loop where `at` is constant.
#if __has_builtin(__builtin_shuffle)
#define SHUFFLE(x, y, at) __builtin_shuffle(x, y, at)
#else
#define SHUFFLE(x, y, at)                                                                             \
  ({                                                                                                  \
    __typeof__(x) first_ = (x), second_ = (y), to_ = first_;                                          \
    __typeof__(at) from_ = (at);                                                                      \
    enum { N_ = sizeof to_ / sizeof to_[0] };                                                         \
    for (int l = 0; l < N_; l++) to_[l] = from_[l] & N_ ? second_[from_[l] % N_] : first_[from_[l] % N_]; \
    to_;                                                                                              \
  })
#endif

#define EXPORT __attribute__((visibility("default")))
#define ENTRY(name) EXPORT void KERNEL(name)(const name##_args *a)
#define SCRATCH(name) EXPORT int64_t KERNEL(name##_scratch)  // bytes of scratch that entry `name` needs

#define HG_IS_f32 0
#define HG_IS_bf16 1
#define HG_IS_NAME(d) HG_IS_CAT(d)
#define HG_IS_CAT(d) HG_IS_##d
#define HG_BF16 HG_IS_NAME(HG_DTYPE)

typedef uint16_t bf16;
static inline float bf16_to_float(bf16 v) {
  union { uint32_t u; float f; } x = {.u = (uint32_t)v << 16};
  return x.f;
}
// Rounds to nearest even; NaN stays NaN. Branch-free, so that loops over it vectorise.
static inline bf16 float_to_bf16(float f) {
  union { float f; uint32_t u; } x = {.f = f};
  uint32_t rounded = (x.u + 0x7fffu + ((x.u >> 16) & 1u)) >> 16;
  return (bf16)(f == f ? rounded : 0x7fc0u);
}

// Splits a float32 weight: its nearest bf16, which the model reads, and a signed 16-bit remainder, which only the
// update reads. join_weight restores every bit. Ties round away from zero, so that the remainder fits 16 bits.
static inline bf16 split_weight(float f, int16_t *low) {
  union { float f; uint32_t u; } x = {.f = f};
  uint32_t high = (x.u + 0x8000u) >> 16;
  *low = (int16_t)(uint16_t)x.u;  // the low half; negative exactly where the high half was rounded up
  return (bf16)high;
}
static inline float join_weight(bf16 high, int16_t low) {
  union { uint32_t u; float f; } x = {.u = ((uint32_t)high << 16) + (uint32_t)(int32_t)low};
  return x.f;
}

#if HG_BF16
typedef bf16 real;
static inline float load(real v) { return bf16_to_float(v); }
static inline real store(float v) { return float_to_bf16(v); }
#else
typedef float real;
static inline float load(real v) { return v; }
static inline real store(float v) { return v; }
#endif
