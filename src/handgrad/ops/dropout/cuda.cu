// dropout: y = x * (kept ? 1 / (1 - p) : 0); its own gradient, applied to dy                     math: README.md §2, §3
// forward   writes =  y: (N, C) dtype
// numerics  one multiplication in f32, one rounding
// layout    a grid that fills the GPU; 16-byte accesses; four elements share one call of the generator
// determinism  an element's bits depend on scalars, call and its index alone
// speed     H100 80GB, bf16, bench/gpu_ops.py, 2026-11-24: 2.54 TB/s (85 % of the copy rate)
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 16 bytes of them where N C is a multiple, else 1
// -DWIDTH    elements that a thread takes at a time
// -DTHREADS  of a block
#if !defined(VEC) || !defined(WIDTH) || !defined(THREADS)
#error "dropout/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
dropout_forward_kernel(real *__restrict__ y, const real *__restrict__ x,  // (N, C)
                       const StepScalars *scalars, i64 N, i64 C, float p, i64 call) {
  const DropoutRule rule(scalars, p, call);
  const i64 n = N * C;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * WIDTH; i < n; i += (i64)gridDim.x * THREADS * WIDTH) {
    Pack<real, WIDTH> v = {};
    if constexpr (VEC > 1) v = load<real, WIDTH>(x + i);
    else
      for (int k = 0; k < WIDTH; k++)
        if (i + k < n) v.v[k] = x[i + k];
#pragma unroll
    for (int quad = 0; quad < WIDTH / 4; quad++) {
      const uint4 bits = rule.bits(i / 4 + quad);
      v.set(4 * quad, v.at(4 * quad) * rule.factor(bits.x));
      v.set(4 * quad + 1, v.at(4 * quad + 1) * rule.factor(bits.y));
      v.set(4 * quad + 2, v.at(4 * quad + 2) * rule.factor(bits.z));
      v.set(4 * quad + 3, v.at(4 * quad + 3) * rule.factor(bits.w));
    }
    if constexpr (VEC > 1) store(y + i, v);
    else
      for (int k = 0; k < WIDTH; k++)
        if (i + k < n) y[i + k] = v.v[k];
  }
}
