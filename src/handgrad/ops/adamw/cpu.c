// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; bias corrections in double
// layout    one pass over flat vectors, blocks of elements shared among threads
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "knobs.h"

#define BLOCK 4096  // elements: every block of every vector starts on a cache line

ENTRY(adamw) {
  real *restrict p = P(0);                       // (n)
  float *restrict m = P(1), *restrict v = P(2);  // (n)
#if HG_BF16
  int16_t *restrict low = P(3);                  // (n)
#endif
  const float *restrict grad = P(4);             // (n)
  int64_t n = I(5);
  double beta1 = a[6].f, beta2 = a[7].f, eps = a[8].f, weight_decay = a[9].f;
  const Knobs *knobs = P(10);
  float keep1 = (float)beta1, take1 = (float)(1.0 - beta1), keep2 = (float)beta2, take2 = (float)(1.0 - beta2);
  float scale = knobs->grad_scale, shrink = (float)(1.0 - (double)knobs->lr * weight_decay), floor = (float)eps;
  float rate = (float)((double)knobs->lr / (1.0 - pow(beta1, (double)knobs->step)));
  float root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)knobs->step)));
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += BLOCK) {
    int64_t to = from + BLOCK < n ? from + BLOCK : n;
#pragma omp simd
    for (int64_t i = from; i < to; i++) {
      float g = grad[i] * scale;
      m[i] = keep1 * m[i] + take1 * g;
      v[i] = keep2 * v[i] + take2 * (g * g);
#if HG_BF16
      float weight = join_weight(p[i], low[i]);
#else
      float weight = p[i];
#endif
      weight = shrink * weight - rate * (m[i] / (sqrtf(v[i]) * root + floor));
#if HG_BF16
      p[i] = split_weight(weight, low + i);
#else
      p[i] = weight;
#endif
    }
  }
}
