// pick: y[m] = x[rows[m]], 0 where rows[m] < 0                                                   math: README.md §2, §3
// forward   writes =  y: (M, C) dtype
// backward  writes =  dx: (N, C) dtype; rows that nothing picked are 0
// numerics  forward copies; backward sums in float in the order of m and rounds once
// layout    backward: one thread links the places that picked the same row, then threads divide the rows of dx
// determinism  every element sums in the order of m, for any number of threads
// source    own work
#include "kernel.h"

ENTRY(pick_forward) {
  real *y = a->y;                 // (M, C)
  const real *x = a->x;           // (N, C)
  const int32_t *rows = a->rows;  // (M), each < N
  int64_t M = a->M, C = a->C;
#pragma omp parallel for schedule(static) if (M * C > 16384)
  for (int64_t m = 0; m < M; m++) {
    if (rows[m] < 0) memset(y + m * C, 0, sizeof(real) * (size_t)C);
    else memcpy(y + m * C, x + rows[m] * C, sizeof(real) * (size_t)C);
  }
}

// The first place that picked each row, and the next one after each place; -1: none.
SCRATCH(pick_backward)(int64_t N, int64_t M) { return (int64_t)sizeof(int32_t) * (N + M); }

ENTRY(pick_backward) {
  real *dx = a->dx;               // (N, C)
  const real *dy = a->dy;         // (M, C)
  const int32_t *rows = a->rows;  // (M)
  int64_t N = a->N, M = a->M, C = a->C;
  int32_t *first = a->scratch, *next = first + N;
  for (int64_t n = 0; n < N; n++) first[n] = -1;
  for (int64_t m = M - 1; m >= 0; m--) {  // backwards, so that each list ascends
    if (rows[m] < 0) continue;
    next[m] = first[rows[m]];
    first[rows[m]] = (int32_t)m;
  }
#pragma omp parallel for schedule(static) if (N * C > 16384)
  for (int64_t n = 0; n < N; n++) {
    enum { COLS = 128 };
    for (int64_t c = 0; c < C; c += COLS) {
      int64_t cols = C - c < COLS ? C - c : COLS;
      float sum[COLS] = {0};
      for (int32_t m = first[n]; m >= 0; m = next[m])
        for (int64_t q = 0; q < cols; q++) sum[q] += load(dy[m * C + c + q]);
      for (int64_t q = 0; q < cols; q++) dx[n * C + c + q] = store(sum[q]);
    }
  }
}
