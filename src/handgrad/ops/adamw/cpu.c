// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; bias corrections in double;  in bf16 without low the new weight is rounded at random: README.md §5
// layout    one pass over flat vectors, blocks of elements shared among threads
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "philox.h"

#define BLOCK 512  // elements: random bits stay in the first cache; every block of every vector starts on a cache line

typedef struct { float scale, keep1, take1, keep2, take2, rate, root, floor, shrink; } Rule;

// The new weight; moves the moments.
static inline float update(float weight, float *restrict m, float *restrict v, float grad, Rule r) {
  float g = grad * r.scale;
  *m = r.keep1 * *m + r.take1 * g;
  *v = r.keep2 * *v + r.take2 * (g * g);
  return r.shrink * weight - r.rate * (*m / (sqrtf(*v) * r.root + r.floor));
}

#if HG_BF16
#define WEIGHT_STREAM ((uint64_t)0xFFFF << 48)  // the last of the 2^16 numbers of random calls

// p = weight, up or down to a bf16: up as often as the 16 bits that are cut off say. `first` is a multiple of 4.
static inline void round_weights(real *restrict p, const float *restrict weight, int64_t first, int64_t n,
                                 const StepScalars *scalars) {
  uint32_t bits[BLOCK];
#pragma omp simd
  for (int64_t quad = 0; quad < (n + 3) / 4; quad++) {
    philox4 r = philox((uint64_t)(first / 4 + quad), WEIGHT_STREAM ^ (uint64_t)scalars->step, scalars->seed);
    for (int lane = 0; lane < 4; lane++) bits[4 * quad + lane] = r.v[lane];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    union { float f; uint32_t u; } x = {.f = weight[i]};
    uint32_t rounded = (x.u + (bits[i] & 0xffffu)) >> 16;
    p[i] = (x.u & 0x7f800000u) == 0x7f800000u ? store(x.f) : (real)rounded;
  }
}
#endif

ENTRY(adamw) {
  real *restrict p = a->p;                       // (n)
  float *restrict m = a->m, *restrict v = a->v;  // (n)
#if HG_BF16
  int16_t *restrict low = a->low;                // (n) or NULL
  int64_t start = a->start;                      // of the slice in the flat order of all parameters, elements
#endif
  const float *restrict grad = a->grad;          // (n)
  int64_t n = a->n;
  double beta1 = a->beta1, beta2 = a->beta2, eps = a->eps, weight_decay = a->weight_decay;
  const StepScalars *scalars = a->scalars;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  Rule r = {.scale = scalars->grad_scale, .keep1 = (float)beta1, .take1 = (float)(1.0 - beta1), .keep2 = (float)beta2,
            .take2 = (float)(1.0 - beta2), .rate = (float)((double)scalars->lr / (1.0 - pow(beta1, (double)scalars->step))),
            .root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)scalars->step))), .floor = (float)eps,
            .shrink = (float)(1.0 - (double)scalars->lr * weight_decay)};
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += BLOCK) {
    int64_t to = from + BLOCK < n ? from + BLOCK : n;
#if HG_BF16
    if (low) {
#pragma omp simd
      for (int64_t i = from; i < to; i++)
        p[i] = split_weight(update(join_weight(p[i], low[i]), m + i, v + i, grad[i], r), low + i);
    } else {
      float weight[BLOCK];
#pragma omp simd
      for (int64_t i = from; i < to; i++) weight[i - from] = update(load(p[i]), m + i, v + i, grad[i], r);
      round_weights(p + from, weight, start + from, to - from, scalars);
    }
#else
#pragma omp simd
    for (int64_t i = from; i < to; i++) p[i] = update(p[i], m + i, v + i, grad[i], r);
#endif
  }
}
