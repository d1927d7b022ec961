// cap_logits: y = softcap tanh(scale z / softcap); softcap 0: y = scale z                           math: README.md §2
// writes =  y: (N, V) dtype
// numerics  float inside, one rounding
// source    own work
#include "vmath.h"

ENTRY(cap_logits) {
  real *y = a->y;        // (N, V)
  const real *z = a->z;  // (N, V)
  float scale = (float)a->scale, softcap = (float)a->softcap;
  int64_t n = a->N * a->V;
  if (softcap == 0.0f) {
#pragma omp parallel for simd schedule(simd : static) if (n > 4096)
    for (int64_t i = 0; i < n; i++) y[i] = store(load(z[i]) * scale);
  } else {
#pragma omp parallel for simd schedule(simd : static) if (n > 4096)
    for (int64_t i = 0; i < n; i++) y[i] = store(softcap * vtanh(load(z[i]) * scale / softcap));
  }
}
