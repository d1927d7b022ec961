// embed: y = scale wte[id] + wpe[position]                                                       math: README.md §2, §3
// forward   writes =  y: (N, C) dtype
// backward  writes = or += dwte: (V, C) f32, dwpe: (Tmax, C) f32; rows that no token reaches are set to zero when =
// numerics  one rounding forward; gradients summed in f32 in row order
// layout    forward: threads divide rows; backward: columns, so that no two threads write the same element of dwte
// determinism  every element sums its rows in order, for any number of threads
// source    own work
#include "scalars.h"

ENTRY(embed_forward) {
  real *restrict y = a->y;                  // (N, C)
  const int32_t *ids = a->ids;              // (N), each < V
  const real *restrict wte = a->wte;        // (V, C)
  const real *restrict wpe = a->wpe;        // (Tmax, C) or NULL
  const int32_t *positions = a->positions;  // (N), each < Tmax, or NULL
  float scale = (float)a->scale;
  int64_t N = a->N, C = a->C, T = a->T;
  int decode = a->decode != 0;        // rows continue the cached sequences
  const StepScalars *scalars = a->scalars;
  int64_t position = decode ? scalars->position : 0;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    real *to = y + n * C;
    const real *wte_row = wte + ids[n] * C;
    if (!wpe) {
#pragma omp simd
      for (int64_t c = 0; c < C; c++) to[c] = store(scale * load(wte_row[c]));
      continue;
    }
    const real *wpe_row = wpe + (positions ? positions[n] : position + n % T) * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) to[c] = store(scale * load(wte_row[c]) + load(wpe_row[c]));
  }
}

#define STRIPE 16  // columns: one cache line of a gradient, the least that a thread owns

ENTRY(embed_backward) {
  float *restrict dwte = a->dwte;   // (V, C) or NULL
  float *restrict dwpe = a->dwpe;   // (Tmax, C) or NULL
  const real *restrict dy = a->dy;  // (N, C)
  const int32_t *ids = a->ids;      // (N)
  const int32_t *positions = a->positions;  // (N) or NULL
  float scale = (float)a->scale;
  int64_t N = a->N, C = a->C, V = a->V, T = a->T, Tmax = a->Tmax;
  int64_t stripes = (C + STRIPE - 1) / STRIPE;
#pragma omp parallel
  {
    int64_t from = stripes * hg_thread() / hg_num_threads() * STRIPE;
    int64_t to = stripes * (hg_thread() + 1) / hg_num_threads() * STRIPE;
    to = to < C ? to : C;
    size_t width = from < to ? (size_t)(to - from) * sizeof(float) : 0;
    if (dwte && !a->accumulate_dwte)
      for (int64_t i = 0; i < V; i++) memset(dwte + i * C + from, 0, width);
    if (dwpe && !a->accumulate_dwpe)
      for (int64_t t = 0; t < Tmax; t++) memset(dwpe + t * C + from, 0, width);
    for (int64_t n = 0; n < N; n++) {
      const real *g = dy + n * C;
      if (dwte) {
        float *dwte_row = dwte + ids[n] * C;
#pragma omp simd
        for (int64_t c = from; c < to; c++) dwte_row[c] += scale * load(g[c]);
      }
      if (!dwpe) continue;
      float *dwpe_row = dwpe + (positions ? positions[n] : n % T) * C;
#pragma omp simd
      for (int64_t c = from; c < to; c++) dwpe_row[c] += load(g[c]);
    }
  }
}
