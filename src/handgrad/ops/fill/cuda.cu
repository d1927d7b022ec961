// fill: x = or += value                                                                            math: README.md §2
// writes = or +=  x: (n) grad_t
// layout    a grid that fills the GPU; 16-byte accesses
// speed     H100 80GB, bf16, bench/gpu_ops.py, 2026-11-24: 2.60 TB/s (87 % of the copy rate), one block
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 16 bytes of them where n is a multiple, else 1
// -DTHREADS  of a block
#if !defined(VEC) || !defined(THREADS)
#error "fill/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
fill_kernel(grad_t *__restrict__ x,  // (n)
            i64 n, float value, i64 accumulate) {
  if (accumulate && value == 0.0f) return;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += (i64)gridDim.x * THREADS * VEC) {
    Pack<grad_t, VEC> v = {};
    if (accumulate) v = load<grad_t, VEC>(x + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) v.set(k, accumulate ? v.at(k) + value : value);
    store(x + i, v);
  }
}
