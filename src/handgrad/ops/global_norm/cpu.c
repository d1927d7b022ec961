// global_norm: the L2 norm of all gradients and the clip factor                                    math: README.md §2
// writes =  scalars.grad_norm, scalars.grad_scale
// numerics  squares and sums in double: squares of finite gradients do not overflow, and order hardly matters
// layout    threads divide chunks of elements; one partial sum a chunk
// determinism  chunks are fixed and added in order, for any number of threads; NaN and inf reach grad_norm
// source    own work; clipping as torch.nn.utils.clip_grad_norm_
#include "scalars.h"
#include "squares.h"

SCRATCH(global_norm)(int64_t n) { return squares_scratch(n); }

ENTRY(global_norm) {
  StepScalars *scalars = a->scalars;
  const float *grad = a->grad;   // (n)
  float clip = a->clip;          // largest norm that is not scaled down; 0: no clipping
  double *partial = a->scratch;  // one a chunk
  float norm = (float)sqrt(sum_of_squares(grad, a->n, partial)), scale = clip > 0.0f ? clip / (norm + 1e-6f) : 1.0f;
  scalars->grad_norm = norm;
  scalars->grad_scale = !isfinite(norm) ? 0.0f : scale > 1.0f ? 1.0f : scale;  // 0: no update
}
