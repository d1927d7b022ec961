// adamw: m, v, p from a gradient; decay is decoupled                                                math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  master: (n) f32, of which p is the rounded copy
// numerics  f32; bias corrections in double
// layout    one pass over flat vectors, blocks of elements shared among threads
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "knobs.h"

#define BLOCK 4096  // elements: every block of every vector starts on a cache line

typedef struct {
  float keep1, take1, keep2, take2;  // beta1, 1 - beta1, beta2, 1 - beta2
  float scale, decay, rate, root, eps;  // of the gradient; 1 - lr * wd; lr / correction 1; 1 / sqrt(correction 2)
} Step;

// Elements [from, to). Inlined twice: with master weights, and with NULL, where p is its own master.
static inline __attribute__((always_inline)) void update(real *restrict p, float *restrict m, float *restrict v,
                                                         float *restrict master, const float *restrict grad,
                                                         int64_t from, int64_t to, Step k) {
#pragma omp simd
  for (int64_t i = from; i < to; i++) {
    float g = grad[i] * k.scale, weight = master ? master[i] : load(p[i]);
    m[i] = k.keep1 * m[i] + k.take1 * g;
    v[i] = k.keep2 * v[i] + k.take2 * (g * g);
    weight = k.decay * weight - k.rate * (m[i] / (sqrtf(v[i]) * k.root + k.eps));
    if (master) master[i] = weight;
    p[i] = store(weight);
  }
}

ENTRY(adamw) {
  real *p = P(0);                // (n)
  float *m = P(1), *v = P(2);    // (n)
  float *master = P(3);          // (n) or NULL
  const float *grad = P(4);      // (n)
  int64_t n = I(5);
  double beta1 = a[6].f, beta2 = a[7].f, eps = a[8].f, weight_decay = a[9].f;
  const Knobs *knobs = P(10);
  Step k = {.keep1 = (float)beta1, .take1 = (float)(1.0 - beta1), .keep2 = (float)beta2, .take2 = (float)(1.0 - beta2),
            .scale = knobs->grad_scale, .decay = (float)(1.0 - (double)knobs->lr * weight_decay),
            .rate = (float)((double)knobs->lr / (1.0 - pow(beta1, (double)knobs->step))),
            .root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)knobs->step))), .eps = (float)eps};
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += BLOCK) {
    int64_t to = from + BLOCK < n ? from + BLOCK : n;
    if (master) update(p, m, v, master, grad, from, to, k);
    else update(p, m, v, NULL, grad, from, to, k);
  }
}
