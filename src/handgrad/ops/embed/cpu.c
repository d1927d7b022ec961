// embed: y = wte[id] + wpe[position]                                                             math: README.md §2, §3
// forward   writes =  y: (N, C) dtype
// backward  writes = or += dwte: (V, C) f32, dwpe: (Tmax, C) f32; what no row reaches is zero when =
// numerics  one rounding forward; gradients summed in f32 in row order
// layout    forward: rows are shared among threads; backward: columns are, so no two threads meet in a row of dwte
// determinism  every element sums its rows in order, whatever the number of threads
// source    own work
#include "scalars.h"

ENTRY(embed_forward) {
  real *restrict y = P(0);          // (N, C)
  const int32_t *ids = P(1);        // (N), each < V
  const real *restrict wte = P(2);  // (V, C)
  const real *restrict wpe = P(3);  // (Tmax, C) or NULL
  int64_t N = I(4), C = I(5), T = I(6);
  int decode = I(7) != 0;  // rows continue the sequences in the cache
  const StepScalars *scalars = P(8);
  int64_t position = decode ? scalars->position : 0;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    real *to = y + n * C;
    const real *token = wte + ids[n] * C;
    if (!wpe) {
      memcpy(to, token, (size_t)C * sizeof(real));
      continue;
    }
    const real *place = wpe + (position + n % T) * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) to[c] = store(load(token[c]) + load(place[c]));
  }
}

#define STRIPE 16  // columns: one cache line of a gradient, the least that a thread owns

ENTRY(embed_backward) {
  float *restrict dwte = P(0);     // (V, C)
  float *restrict dwpe = P(1);     // (Tmax, C) or NULL
  const real *restrict dy = P(2);  // (N, C)
  const int32_t *ids = P(3);       // (N)
  int64_t N = I(4), C = I(5), V = I(6), T = I(7), Tmax = I(8);
  const StepScalars *scalars = P(11);
  int add_te = I(9) || scalars->micro_step > 0, add_pe = I(10) || scalars->micro_step > 0;
  int64_t stripes = (C + STRIPE - 1) / STRIPE;
#pragma omp parallel
  {
    int64_t from = stripes * hg_thread() / hg_team() * STRIPE, to = stripes * (hg_thread() + 1) / hg_team() * STRIPE;
    to = to < C ? to : C;
    size_t width = from < to ? (size_t)(to - from) * sizeof(float) : 0;
    if (!add_te)
      for (int64_t i = 0; i < V; i++) memset(dwte + i * C + from, 0, width);
    if (dwpe && !add_pe)
      for (int64_t t = 0; t < Tmax; t++) memset(dwpe + t * C + from, 0, width);
    for (int64_t n = 0; n < N; n++) {
      const real *g = dy + n * C;
      float *token = dwte + ids[n] * C;
#pragma omp simd
      for (int64_t c = from; c < to; c++) token[c] += load(g[c]);
      if (!dwpe) continue;
      float *place = dwpe + n % T * C;
#pragma omp simd
      for (int64_t c = from; c < to; c++) place[c] += load(g[c]);
    }
  }
}
