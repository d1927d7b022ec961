// rms: the root mean square of a parameter's weights                                               math: README.md §2
// writes =  y: (1) f32
// numerics  squares and sums in double
// layout    threads divide blocks of elements; one partial sum a block
// determinism  blocks are fixed and added in order, for any number of threads
// source    own work
#include "kernel.h"

#define BLOCK 4096  // elements

SCRATCH(rms)(int64_t n) { return (n + BLOCK - 1) / BLOCK * (int64_t)sizeof(double); }

ENTRY(rms) {
  float *y = a->y;               // (1)
  const real *p = a->p;          // (n)
  double *partial = a->scratch;  // one a block
  int64_t n = a->n, blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < blocks; k++) {
    int64_t end = (k + 1) * BLOCK < n ? (k + 1) * BLOCK : n;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k * BLOCK; i < end; i++) sum += (double)load(p[i]) * (double)load(p[i]);
    partial[k] = sum;
  }
  double sum = 0.0;
  for (int64_t k = 0; k < blocks; k++) sum += partial[k];
  y[0] = (float)fmax(sqrt(sum / (double)a->count), a->least);
}
