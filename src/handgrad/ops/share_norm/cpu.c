// share_norm: the L2 norm of one rank's gradients of a bucket                                      math: README.md §2
// writes =  y: (1) f32
// numerics  squares and sums in double: squares of finite gradients do not overflow, and order hardly matters
// layout    threads divide chunks of elements; one partial sum a chunk
// determinism  chunks are fixed and added in order, for any number of threads; NaN and inf reach y
// source    own work
#include "kernel.h"

#define CHUNK 32768  // elements

SCRATCH(share_norm)(int64_t n) { return (n + CHUNK - 1) / CHUNK * (int64_t)sizeof(double); }

ENTRY(share_norm) {
  float *y = a->y;               // (1)
  const float *x = a->x;         // (n)
  int64_t n = a->n, chunks = (n + CHUNK - 1) / CHUNK;
  double *partial = a->scratch;  // (chunks)
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < chunks; k++) {
    int64_t end = (k + 1) * CHUNK < n ? (k + 1) * CHUNK : n;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k * CHUNK; i < end; i++) sum += (double)x[i] * (double)x[i];
    partial[k] = sum;
  }
  double total = 0.0;
  for (int64_t k = 0; k < chunks; k++) total += partial[k];
  y[0] = (float)sqrt(total);
}
