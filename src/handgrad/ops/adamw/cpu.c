// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; bias corrections in double;  in bf16 without low the new weight is rounded at random: README.md §5
// layout    one pass over flat vectors, blocks of elements shared among threads
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "philox.h"

#define BLOCK 512  // elements: new weights stay in the first cache; every block of every vector starts on a cache line
#define WEIGHT_STREAM ((uint64_t)0xFFFF << 48)  // the last of the 2^16 numbers of random calls

#if HG_BF16
// p = weight, up or down to a bf16: up as often as the 16 bits that are cut off say. first is a multiple of 4.
static inline void round_weights(real *restrict p, const float *restrict weight, int64_t first, int64_t n,
                                 const Knobs *knobs) {
  uint32_t bits[BLOCK];
#pragma omp simd
  for (int64_t quad = 0; quad < (n + 3) / 4; quad++) {
    philox4 r = philox((uint64_t)(first / 4 + quad), WEIGHT_STREAM ^ (uint64_t)knobs->step, knobs->seed);
    for (int lane = 0; lane < 4; lane++) bits[4 * quad + lane] = r.v[lane];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    union { float f; uint32_t u; } x = {.f = weight[i]};
    int finite = (x.u & 0x7f800000u) != 0x7f800000u;
    p[i] = (real)(finite ? (x.u + (bits[i] & 0xffffu)) >> 16 : store(x.f));
  }
}
#endif

ENTRY(adamw) {
  real *restrict p = P(0);                       // (n)
  float *restrict m = P(1), *restrict v = P(2);  // (n)
  int16_t *restrict low = P(3);                  // (n) or NULL
  const float *restrict grad = P(4);             // (n)
  int64_t n = I(5), start = I(6);                // start: of the stretch in the flat vector, elements
  double beta1 = a[7].f, beta2 = a[8].f, eps = a[9].f, weight_decay = a[10].f;
  const Knobs *knobs = P(11);
  float keep1 = (float)beta1, take1 = (float)(1.0 - beta1), keep2 = (float)beta2, take2 = (float)(1.0 - beta2);
  float scale = knobs->grad_scale, shrink = (float)(1.0 - (double)knobs->lr * weight_decay), floor = (float)eps;
  float rate = (float)((double)knobs->lr / (1.0 - pow(beta1, (double)knobs->step)));
  float root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)knobs->step)));
  (void)low, (void)start;
  if (scale == 0.0f) return;  // the gradients are not finite
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += BLOCK) {
    float weight[BLOCK];
    int64_t size = from + BLOCK < n ? BLOCK : n - from;
    real *restrict q = p + from;
#if HG_BF16
    int16_t *restrict rest = low ? low + from : NULL;
    if (low) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) weight[i] = join_weight(q[i], rest[i]);
    } else
#endif
#pragma omp simd
      for (int64_t i = 0; i < size; i++) weight[i] = load(q[i]);
#pragma omp simd
    for (int64_t i = from; i < from + size; i++) {
      float g = grad[i] * scale;
      m[i] = keep1 * m[i] + take1 * g;
      v[i] = keep2 * v[i] + take2 * (g * g);
      weight[i - from] = shrink * weight[i - from] - rate * (m[i] / (sqrtf(v[i]) * root + floor));
    }
#if HG_BF16
    if (low) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) q[i] = split_weight(weight[i], rest + i);
    } else {
      round_weights(q, weight, start + from, size, knobs);
    }
#else
#pragma omp simd
    for (int64_t i = 0; i < size; i++) q[i] = weight[i];
#endif
  }
}
