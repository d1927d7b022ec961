// attention_backward: drel from the sums of every block of rows                                     math: README.md §3
// writes =  drel: (R, H), or += if accumulate
// numerics  f32 sums
// layout    a block sums one bucket of one head
// determinism  fixed order, no atomics
// speed     not measured yet; reads R floats for each block of rows
// source    own work
//
// Defines (op.py): THREADS.
#include "kernel.cuh"
#if !defined(THREADS)
#error "attention/op.py defines THREADS"
#endif

KERNEL __launch_bounds__(THREADS) attention_backward_drel_kernel(
    grad_t *drel,        // (R, H), in and out
    const float *parts,  // (B, H, blocks, R)
    i64 B, i64 H, i64 R, i64 blocks, i64 accumulate) {
  __shared__ float buffer[THREADS / 32];
  const i64 r = blockIdx.x / H, h = blockIdx.x % H;
  float sum = 0.0f;
  for (i64 i = threadIdx.x; i < B * blocks; i += THREADS)
    sum += parts[((i / blocks * H + h) * blocks + i % blocks) * R + r];
  sum = block_reduce<THREADS>(sum, Sum(), 0.0f, buffer);
  if (threadIdx.x == 0) drel[r * H + h] = from_float<grad_t>(sum + (accumulate ? to_float(drel[r * H + h]) : 0.0f));
}
