// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the low half of the float32 weight
// numerics  f32; bias corrections in double;  in bf16 without low: stochastic rounding, README.md §5
// layout    one pass over flat vectors; threads divide blocks of elements
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "philox.h"

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver pow,pow@GLIBC_2.2.5");  // the newer version differs in errno alone, and needs glibc 2.29
#endif

#define BLOCK 512  // elements: random bits stay in L1; every block of every vector starts on a cache line

// rest: 1 - beta. rate, root: the bias-corrected learning rate and factor of sqrt(v). decay: 1 - lr * weight_decay.
typedef struct { float scale, beta1, rest1, beta2, rest2, rate, root, eps, decay; } Rule;

// Returns the new weight and updates the moments.
static inline float update(float weight, float *restrict m, float *restrict v, float grad, Rule r) {
  float g = grad * r.scale;
  *m = r.beta1 * *m + r.rest1 * g;
  *v = r.beta2 * *v + r.rest2 * (g * g);
  return r.decay * weight - r.rate * (*m / (sqrtf(*v) * r.root + r.eps));
}

#if HG_BF16
#define WEIGHT_STREAM ((uint64_t)0xFFFF << 48)  // the last of the 2^16 numbers of random calls

// p = weight, stochastically rounded to bf16: up with probability low 16 bits / 2^16. `first` is a multiple of 4.
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
  int64_t start = a->start;                      // first element of the slice in the flat order of all parameters
#endif
  const float *restrict grad = a->grad;          // (n)
  int64_t n = a->n;
  double beta1 = a->beta1, beta2 = a->beta2, eps = a->eps, weight_decay = a->weight_decay;
  const StepScalars *scalars = a->scalars;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  double lr = scalars->lr, step = (double)scalars->step;
  Rule r = {.scale = scalars->grad_scale, .beta1 = (float)beta1, .rest1 = (float)(1.0 - beta1), .beta2 = (float)beta2,
            .rest2 = (float)(1.0 - beta2), .rate = (float)(lr / (1.0 - pow(beta1, step))),
            .root = (float)(1.0 / sqrt(1.0 - pow(beta2, step))), .eps = (float)eps,
            .decay = (float)(1.0 - lr * weight_decay)};
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
