// Packing for gemm.c: vector types of the instruction set, packed elements, and how operands are packed into panels.
//
// A packed element is a `unit` of 4 bytes: one float, or with vdpbf16ps two bf16 neighbours in k, which that
// instruction multiplies and adds at once. Without vdpbf16ps packing converts bf16 to float.
#pragma once
#include "kernel.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
#if HG_BF16 && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
enum { KPU = PAIRS ? 2 : 1 };  // elements of k in a unit

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t units __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Four units of LANES / 4 rows: lane group g holds row 4 g. Rows are `ld` bytes apart.
static inline units four_units(const char *p, int64_t ld) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 4 * ld)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 8 * ld)), 2);
  return (units)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 12 * ld)), 3);
#elif defined(__AVX2__)
  return (units)_mm256_loadu2_m128i((const __m128i *)(p + 4 * ld), (const __m128i *)p);
#else
  (void)ld;
  units v;
  memcpy(&v, p, sizeof v);
  return v;
#endif
}

// dst[u * stride + i] = unit u of row i, of a block of LANES x LANES units; rows are `ld` bytes apart. Loading by
// quarters puts every unit into its lane group (as fast as a copy). That leaves the 4 x 4 transposes inside the groups:
// two rounds of unpack.
static inline void transpose(int32_t *dst, int stride, const void *src, int64_t ld) {
  units low1, high1, low2, high2;
  for (int l = 0; l < LANES; l++) {
    int at = l / 4 * 4, other = l & 1 ? LANES : 0, from = l & 2 ? LANES : 0;
    low1[l] = other + at + l % 4 / 2;
    high1[l] = other + at + 2 + l % 4 / 2;
    low2[l] = from + at + l % 2;
    high2[l] = from + at + 2 + l % 2;
  }
#pragma GCC unroll 4
  for (int s = 0; s < LANES; s += 4) {
    const char *p = (const char *)src + 4 * s;
    units r0 = four_units(p, ld), r1 = four_units(p + ld, ld);
    units r2 = four_units(p + 2 * ld, ld), r3 = four_units(p + 3 * ld, ld);
    units a = SHUFFLE(r0, r1, low1), b = SHUFFLE(r0, r1, high1);
    units c = SHUFFLE(r2, r3, low1), d = SHUFFLE(r2, r3, high1);
    units column[4] = {SHUFFLE(a, c, low2), SHUFFLE(a, c, high2), SHUFFLE(b, d, low2),
                       SHUFFLE(b, d, high2)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) memcpy(dst + (s + i) * stride, &column[i], sizeof(units));
  }
}

// One unit of each of LANES neighbours that are contiguous in memory; the next element of k is at p + ld.
static inline units load_across(const real *p, int64_t ld, int64_t left) {
#if HG_BF16
  halves h;
  memcpy(&h, p, sizeof h);
  words v = __builtin_convertvector(h, words);
  if (!PAIRS) return (units)(v << 16);
  if (left < 2) return (units)v;
  memcpy(&h, p + ld, sizeof h);
  return (units)(v | __builtin_convertvector(h, words) << 16);
#else
  (void)ld, (void)left;
  units v;
  memcpy(&v, p, sizeof v);
  return v;
#endif
}

// LANES units that are contiguous in k; `left` elements exist, the rest is zero.
static inline units load_along_k(const real *p, int64_t left) {
  real edge[LANES * KPU] = {0};
  if (left < LANES * KPU) p = memcpy(edge, p, sizeof(real) * (size_t)left);
#if HG_BF16 && !PAIRS
  halves h;
  memcpy(&h, p, sizeof h);
  return (units)(__builtin_convertvector(h, words) << 16);
#else
  units v;
  memcpy(&v, p, sizeof v);
  return v;
#endif
}

// Packs LANES neighbours (rows of A or columns of B): unit u of neighbour i goes to dst[u * stride + i]. `along_k`:
// each neighbour is contiguous in k and neighbours are ld apart; otherwise neighbours are contiguous and elements of k
// are ld apart. Only `exist` neighbours exist; other lanes hold anything, since their sums are discarded. An odd last
// pair of k is filled with 0.
static void pack_lanes(int32_t *dst, int stride, const real *src, int64_t ld, int along_k, int64_t exist, int64_t k) {
  int64_t n_units = ceil_div(k, KPU), count = least(exist, LANES);
  if (along_k) {
    for (int64_t u = 0; u < n_units; u += LANES) {
      const real *p = src + u * KPU;
      int64_t left = least(k - u * KPU, LANES * KPU);
      if ((PAIRS || !HG_BF16) && count == LANES && left == LANES * KPU) {
        transpose(dst + u * stride, stride, p, ld * (int64_t)sizeof(real));
        continue;
      }
      units block[LANES], across[LANES];
      for (int i = 0; i < LANES; i++) block[i] = i < count ? load_along_k(p + i * ld, left) : (units){0};
      transpose((int32_t *)across, LANES, block, sizeof block[0]);
      int64_t rows = least(n_units - u, LANES);
      for (int64_t i = 0; i < rows; i++) memcpy(dst + (u + i) * stride, &across[i], sizeof across[i]);
    }
    return;
  }
  for (int64_t u = 0; u < n_units; u++) {
    const real *p = src + u * KPU * ld;
    int64_t left = k - u * KPU;
    real edge[KPU][LANES] = {{0}};
    if (count < LANES) {
      for (int64_t q = 0; q < least(KPU, left); q++) memcpy(edge[q], p + q * ld, sizeof(real) * (size_t)count);
    }
    units v = count < LANES ? load_across(edge[0], LANES, left) : load_across(p, ld, left);
    memcpy(dst + u * stride, &v, sizeof v);
  }
}
