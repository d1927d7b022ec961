// pick: y[m] = x[rows[m]], 0 where rows[m] < 0                                                   math: README.md §2, §3
// forward   writes =  y: (M, C) dtype
// clear     writes =  bounds: (N, 2) int, no place
// bounds    writes    bounds: the first and the last place m that picked each row
// sum       writes =  dx: (N, C) dtype; rows that nothing picked are 0
// numerics  forward copies; backward sums in float in the order of m and rounds once
// layout    a thread makes one 16-byte access to a row of y or dx; clear: a thread per row; bounds: a thread per place
// determinism  atomics take the minimum and maximum of integers, whose order does not matter; sums in the order of m
// speed     not measured yet
// source    own work
#include "kernel.cuh"

// -DCOLUMNS  C
// -DVEC      elements of one access: 16 bytes of them where C is a multiple, else 1
// -DTHREADS  of a block
#if !defined(COLUMNS) || !defined(VEC) || !defined(THREADS)
#error "pick/op.py defines these"
#endif
constexpr i64 C = COLUMNS;
constexpr int NONE = 0x7fffffff;  // first > last: nothing picked the row

__device__ __forceinline__ i64 thread_index() { return (i64)blockIdx.x * THREADS + threadIdx.x; }

KERNEL __launch_bounds__(THREADS)
pick_forward_kernel(real *__restrict__ y,          // (M, C)
                    const real *__restrict__ x,    // (N, C)
                    const int *__restrict__ rows,  // (M), each < N
                    i64 M) {
  i64 m = thread_index() / (C / VEC), c = thread_index() % (C / VEC) * VEC;
  if (m >= M) return;
  Pack<real, VEC> v = {};
  if (rows[m] >= 0) v = load<real, VEC>(x + rows[m] * C + c);
  store(y + m * C + c, v);
}

KERNEL __launch_bounds__(THREADS)
pick_clear_kernel(int *__restrict__ bounds,  // (N, 2)
                  i64 N) {
  i64 n = thread_index();
  if (n >= N) return;
  bounds[2 * n] = NONE;
  bounds[2 * n + 1] = -1;
}

KERNEL __launch_bounds__(THREADS)
pick_bounds_kernel(int *__restrict__ bounds,      // (N, 2)
                   const int *__restrict__ rows,  // (M)
                   i64 N, i64 M) {
  i64 m = thread_index();
  if (m >= M || rows[m] < 0) return;
  atomicMin(bounds + 2 * rows[m], (int)m);
  atomicMax(bounds + 2 * rows[m] + 1, (int)m);
}

KERNEL __launch_bounds__(THREADS)
pick_sum_kernel(real *__restrict__ dx,           // (N, C)
                const real *__restrict__ dy,     // (M, C)
                const int *__restrict__ rows,    // (M)
                const int *__restrict__ bounds,  // (N, 2)
                i64 N) {
  i64 n = thread_index() / (C / VEC), c = thread_index() % (C / VEC) * VEC;
  if (n >= N) return;
  Pack<float, VEC> sum = {};
  Pack<real, VEC> v = {};
  for (int m = bounds[2 * n], last = bounds[2 * n + 1]; m <= last; m++) {
    if (rows[m] != n) continue;
    v = load<real, VEC>(dy + m * C + c);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum.v[i] += v.at(i);
  }
#pragma unroll
  for (int i = 0; i < VEC; i++) v.set(i, sum.v[i]);
  store(dx + n * C + c, v);
}
