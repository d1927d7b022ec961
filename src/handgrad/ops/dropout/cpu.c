// dropout: y = x * (kept ? 1 / (1 - p) : 0); its own gradient, applied to dy                     math: README.md §2, §3
// forward   writes =  y: (N, C) dtype
// numerics  one multiplication in f32, one rounding
// layout    threads divide blocks of elements; one call of the generator gives four elements
// determinism  an element's bits depend on the step scalars, call and index alone (philox.h)
// source    own work
#include "philox.h"

ENTRY(dropout_forward) {
  real *y = a->y;        // (N, C)
  const real *x = a->x;  // (N, C)
  int64_t n = a->N * a->C;
  DropoutRule rule = dropout_rule(a->scalars, (float)a->p, a->stream);
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < n; first += DROPOUT_BLOCK) {
    float factor[DROPOUT_BLOCK];
    int64_t size = n - first < DROPOUT_BLOCK ? n - first : DROPOUT_BLOCK;
    dropout_factors(factor, first, size, rule);
#pragma omp simd
    for (int64_t k = 0; k < size; k++) y[first + k] = store(load(x[first + k]) * factor[k]);
  }
}
