// gated: y = act(gate) * up, where x = gate | up                                           math: README.md §2, §3
// forward   writes =  y: (N, M) dtype
// backward  writes =  dx: (N, 2 M) dtype
// numerics  in float, each output rounded once
// layout    threads divide blocks of COLS columns of a row
// source    own work
#include "kernel.h"
#include "vmath.h"

enum { COLS = 2048 };

static inline __attribute__((always_inline)) void forward(real *y, const real *gate, const real *up, int64_t n,
                                                          const int act) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = store(vact(load(gate[i]), act) * load(up[i]));
}

ENTRY(gated) {
  real *y = a->y;        // (N, M)
  const real *x = a->x;  // (N, 2 M)
  int64_t N = a->N, M = a->M;
#pragma omp parallel for collapse(2) schedule(static) if (N * M > 4096)
  for (int64_t r = 0; r < N; r++) {
    for (int64_t j = 0; j < M; j += COLS) {
      const real *gate = x + 2 * r * M + j;
      EACH_ACT(a->act, forward, y + r * M + j, gate, gate + M, M - j < COLS ? M - j : COLS)
    }
  }
}

static inline __attribute__((always_inline)) void backward(real *dgate, real *dup, const real *dy, const real *gate,
                                                           const real *up, int64_t n, const int act) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float d = load(dy[i]), x = load(gate[i]);
    dgate[i] = store(d * load(up[i]) * vact_grad(x, act));
    dup[i] = store(d * vact(x, act));
  }
}

ENTRY(gated_backward) {
  real *dx = a->dx;        // (N, 2 M)
  const real *dy = a->dy;  // (N, M)
  const real *x = a->x;    // (N, 2 M)
  int64_t N = a->N, M = a->M;
#pragma omp parallel for collapse(2) schedule(static) if (N * M > 4096)
  for (int64_t r = 0; r < N; r++) {
    for (int64_t j = 0; j < M; j += COLS) {
      int64_t at = 2 * r * M + j, n = M - j < COLS ? M - j : COLS;
      EACH_ACT(a->act, backward, dx + at, dx + at + M, dy + r * M + j, x + at, x + at + M, n)
    }
  }
}
