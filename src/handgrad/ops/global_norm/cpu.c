// global_norm: the L2 norm of all gradients and the clip factor                                    math: README.md §2
// writes =  scalars.grad_norm, scalars.grad_scale
// numerics  squares and sums in double: squares of finite gradients do not overflow, and order hardly matters
// layout    threads divide chunks of elements; one partial sum a chunk
// determinism  chunks are fixed and added in order, for any number of threads; NaN and inf reach grad_norm
// source    own work; clipping as torch.nn.utils.clip_grad_norm_
#include "scalars.h"

#define CHUNK 32768  // elements

SCRATCH(global_norm)(int64_t n) { return (n + CHUNK - 1) / CHUNK * (int64_t)sizeof(double); }

ENTRY(global_norm) {
  StepScalars *scalars = a->scalars;
  const float *grad = a->grad;   // (n)
  int64_t n = a->n, chunks = (n + CHUNK - 1) / CHUNK;
  float clip = a->clip;          // largest norm that is not scaled down; 0: no clipping
  double *partial = a->scratch;  // (chunks)
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < chunks; k++) {
    int64_t end = (k + 1) * CHUNK < n ? (k + 1) * CHUNK : n;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k * CHUNK; i < end; i++) sum += (double)grad[i] * (double)grad[i];
    partial[k] = sum;
  }
  double total = 0.0;
  for (int64_t k = 0; k < chunks; k++) total += partial[k];
  float norm = (float)sqrt(total), scale = clip > 0.0f ? clip / (norm + 1e-6f) : 1.0f;
  scalars->grad_norm = norm;
  scalars->grad_scale = !isfinite(norm) ? 0.0f : scale > 1.0f ? 1.0f : scale;  // 0: no update
}
