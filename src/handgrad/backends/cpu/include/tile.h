// The register tile of gemm.c: MR x NR sums stay in registers for a whole block of k. Each step of k loads NR numbers
// of B and broadcasts MR of A, so one load feeds several multiply-adds:
//
//               NR (2 vectors)        isa        lanes  MR x NR   registers of sums
//             +---------------+       avx512      16    14 x 32       28 of 32
//   A: MR     |  MR x NR sums |       avx2         8     6 x 16       12 of 16
//   numbers   |               |       neon         4     8 x 12       24 of 32
//             +---------------+       sse          4     4 x  8        8 of 16
#pragma once
#include "pack.h"

#if defined(__AVX512F__)
enum { MR = 14, NV = 2 };
#elif defined(__AVX2__)
enum { MR = 6, NV = 2 };
#elif defined(__aarch64__)
enum { MR = 8, NV = 3 };
#else
enum { MR = 4, NV = 2 };
#endif
enum {
  NR = NV * LANES,
  AR = (MR + LANES - 1) / LANES * LANES,  // stride of a packed A panel: MR rounded up to whole vectors
};

// sum + a * b in every lane; with PAIRS a unit is two products.
static inline vec multiply_add(vec sum, vec a, vec b) {
#if PAIRS
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + a * b;
#endif
}

// Source lines of the thread's next chunk, prefetched while the thread computes this one: a few every SLICE steps of k.
// So packing the next chunk does not wait for memory, and the prefetches do not crowd out the loads of the tile.
typedef struct {
  const char *row;
  int64_t stride, bytes, at, rows;  // between rows; to fetch of each row; fetched of this row; rows left
  int64_t lines;                    // per slice
} Prefetch;
enum { SLICE = 16 };

static inline void prefetch_lines(Prefetch *n) {
  for (int64_t i = 0; i < n->lines && n->rows > 0; i++) {
    __builtin_prefetch(n->row + n->at, 0, 2);
    n->at += 64;
    if (n->at >= n->bytes) {
      n->at = 0;
      n->row += n->stride;
      n->rows--;
    }
  }
}

// How a tile stores its sums: overwrite, add, or non-temporal stores, which do not read a line only to overwrite it.
typedef enum { WRITE, ADD, STREAM } Mode;

static inline void store_vec(float *to, vec v, Mode mode) {
  vec old;
  if (mode == ADD) {
    memcpy(&old, to, sizeof old);
    v += old;
  }
#if defined(__AVX512F__)
  if (mode == STREAM) {
    _mm512_stream_ps(to, (__m512)v);
    return;
  }
#elif defined(__AVX2__)
  if (mode == STREAM) {
    _mm256_stream_ps(to, (__m256)v);
    return;
  }
#endif
  memcpy(to, &v, sizeof v);
}

// c (rows, NR) = or += panel of A * panel of B. `rows` is a constant after inlining, so the sums stay in registers.
static inline __attribute__((always_inline)) void tile_rows(const int rows, int64_t n_units, const float *a,
                                                            const float *b, float *c, int64_t ldc, Mode mode,
                                                            Prefetch *prefetch) {
  vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = (vec){0};
    if (mode == STREAM) continue;
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + NR / 2, 1);
  }
  for (int64_t done = 0; done < n_units; done += SLICE) {
    prefetch_lines(prefetch);
    for (int64_t u = least(SLICE, n_units - done); u > 0; u--) {
      vec bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) memcpy(&bv[j], b + j * LANES, sizeof(vec));
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        vec ai = a[i] - (vec){0};  // a[i] in every lane
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = multiply_add(sum[i][j], ai, bv[j]);
      }
      __builtin_prefetch(a + 24 * AR);  // both streams come from L2 or L3: prefetch about 700 cycles ahead
      __builtin_prefetch(b + 24 * NR);
      __builtin_prefetch(b + 24 * NR + NR / 2);
      a += AR;
      b += NR;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store_vec(c + i * ldc + j * LANES, sum[i][j], mode);
  }
}

static void tile(int64_t rows, int64_t n_units, const float *a, const float *b, float *c, int64_t ldc, Mode mode,
                 Prefetch *prefetch) {
#define ROWS(r) case r: tile_rows(r <= MR ? r : MR, n_units, a, b, c, ldc, mode, prefetch); break;
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
  }
}
