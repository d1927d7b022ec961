// reduce_scatter, its last part: share = or += this rank's sum, which NCCL has left in its part of full   math: README.md
// writes = or +=  share: (m) grad_t
// layout    a grid that fills the GPU; 16-byte accesses: shares are padded to 128 elements
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 16 bytes
// -DTHREADS  of a block
#if !defined(VEC) || !defined(THREADS)
#error "collectives/__init__.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
add_share_kernel(grad_t *__restrict__ share,      // (m)
                 const grad_t *__restrict__ sum,  // (m)
                 i64 m, i64 accumulate) {
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < m; i += (i64)gridDim.x * THREADS * VEC) {
    Pack<grad_t, VEC> v = load<grad_t, VEC>(sum + i);
    if (accumulate) {
      const Pack<grad_t, VEC> old = load<grad_t, VEC>(share + i);
#pragma unroll
      for (int k = 0; k < VEC; k++) v.set(k, old.at(k) + v.at(k));
    }
    store(share + i, v);
  }
}
