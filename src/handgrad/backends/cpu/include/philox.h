// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator.
// The same (seed, step, micro_step, call, element) gives the same bits on any backend and number of threads, so a
// recomputed dropout mask equals the original.
#pragma once
#include "scalars.h"

typedef struct { uint32_t v[4]; } philox4;

static inline philox4 philox(uint64_t counter_lo, uint64_t counter_hi, uint64_t key) {
  uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32);
  uint32_t c2 = (uint32_t)counter_hi, c3 = (uint32_t)(counter_hi >> 32);
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10  // straight-line code, so that a loop over counters vectorises
  for (int round = 0; round < 10; round++) {
    uint64_t m0 = (uint64_t)0xD2511F53u * c0, m1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(m1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(m0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)m1;
    c3 = (uint32_t)m0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (philox4){{c0, c1, c2, c3}};
}

// Dropout, for every op that has it: element i of call `call` is kept where its 32 bits are >= threshold.
// Key: the seed. Counter: (i / 4, stream), where stream combines call, micro_step and step. Lane: i % 4. A kept element
// is scaled by 1 / (1 - p); p < 1.
typedef struct {
  uint64_t key, stream;
  uint32_t threshold;
  float scale;
} DropoutRule;

static inline DropoutRule dropout_rule(const StepScalars *scalars, float p, int64_t call) {
  uint64_t stream = (uint64_t)call << 48 ^ (uint64_t)scalars->micro_step << 32 ^ (uint64_t)scalars->step;
  return (DropoutRule){scalars->seed, stream, (uint32_t)((double)p * 4294967296.0), 1.0f / (1.0f - p)};
}

#define DROPOUT_BLOCK 512  // elements at a time: their bits stay in L1

// factor[k] = scale where element first + k is kept, 0 where it is dropped, for k < n <= DROPOUT_BLOCK
static inline void dropout_factors(float *factor, int64_t first, int64_t n, DropoutRule rule) {
  uint32_t bits[DROPOUT_BLOCK + 8];
  int64_t skip = first % 4;
#pragma omp simd
  for (int64_t quad = 0; quad < (skip + n + 3) / 4; quad++) {
    philox4 r = philox((uint64_t)(first / 4 + quad), rule.stream, rule.key);
    for (int lane = 0; lane < 4; lane++) bits[4 * quad + lane] = r.v[lane];
  }
#pragma omp simd
  for (int64_t k = 0; k < n; k++) factor[k] = bits[skip + k] >= rule.threshold ? rule.scale : 0.0f;
}
