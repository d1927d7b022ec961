// share_norm: the L2 norm of one rank's gradients of a bucket                                      math: README.md §2
// writes =  y: (1) f32
// numerics  squares and sums in double: squares of finite gradients do not overflow, and order hardly matters
// layout    threads divide chunks of elements; one partial sum a chunk
// determinism  chunks are fixed and added in order, for any number of threads; NaN and inf reach y
// source    own work
#include "squares.h"

SCRATCH(share_norm)(int64_t n) { return squares_scratch(n); }

ENTRY(share_norm) {
  float *y = a->y;               // (1)
  const float *x = a->x;         // (n)
  double *partial = a->scratch;  // one a chunk
  y[0] = (float)sqrt(sum_of_squares(x, a->n, partial));
}
