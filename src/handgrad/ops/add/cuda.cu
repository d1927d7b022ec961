// add: y = a + b                                                                                   math: README.md §2
// writes =  y: (N, C) dtype
// numerics  one rounding
// layout    a thread makes MANY 16-byte accesses to each array, all loads before the first store
// speed     H100 80GB, bf16, bench/gpu_ops.py, 2026-11-24: 2.92 TB/s (98 % of the copy rate)
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 16 bytes of them where N C is a multiple, else 1
// -DMANY     accesses of a thread to each array
// -DTHREADS  of a block
#if !defined(VEC) || !defined(MANY) || !defined(THREADS)
#error "add/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
add_kernel(real *__restrict__ y, const real *__restrict__ a, const real *__restrict__ b,  // (N, C)
           i64 N, i64 C) {
  const i64 n = N * C, first = ((i64)blockIdx.x * THREADS * MANY + threadIdx.x) * VEC;
  Pack<real, VEC> left[MANY], right[MANY];
#pragma unroll
  for (int k = 0; k < MANY; k++) {
    i64 i = first + k * THREADS * VEC;
    if (i < n) {
      left[k] = load_streaming<real, VEC>(a + i);
      right[k] = load_streaming<real, VEC>(b + i);
    }
  }
#pragma unroll
  for (int k = 0; k < MANY; k++) {
    i64 i = first + k * THREADS * VEC;
#pragma unroll
    for (int j = 0; j < VEC; j++) left[k].set(j, left[k].at(j) + right[k].at(j));
    if (i < n) store(y + i, left[k]);
  }
}
