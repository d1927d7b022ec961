// cap_logits: y = softcap tanh(scale z / softcap); softcap 0: y = scale z                           math: README.md §2
// writes =  y: (N, V) dtype
// numerics  float inside, one rounding
// layout    a thread makes one 16-byte access
// speed     not measured yet; one pass over the logits of the rows that are sampled
// source    own work
#include "kernel.cuh"

// -DVEC      elements of one access: 16 bytes of them where N V is a multiple, else 1
// -DTHREADS  of a block
// -DCAPPED   1: softcap is not 0
#if !defined(VEC) || !defined(THREADS) || !defined(CAPPED)
#error "cap_logits/op.py defines these"
#endif

KERNEL __launch_bounds__(THREADS)
cap_logits_kernel(real *__restrict__ y,        // (N, V)
                  const real *__restrict__ z,  // (N, V)
                  i64 N, i64 V, float scale, float softcap) {
  i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * VEC;
  if (i >= N * V) return;
  Pack<real, VEC> x = load<real, VEC>(z + i);
#pragma unroll
  for (int q = 0; q < VEC; q++) x.set(q, CAPPED ? softcap * tanhf(x.at(q) * scale / softcap) : x.at(q) * scale);
  store(y + i, x);
}
