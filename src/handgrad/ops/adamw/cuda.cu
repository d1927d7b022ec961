// adamw: m, v, p from a gradient; decay is decoupled                                               math: README.md §2
// writes =  p: (n) dtype;  m, v: (n) f32;  in bf16 low: (n) i16, the half of the float32 weight that p lacks
// numerics  f32; bias corrections in double;  bf16 without low: stochastic rounding, README.md §5
// layout    one pass over flat vectors by a grid that fills the GPU; a thread takes 4 elements at a time
// speed     H100 80GB, GPT-2 124M in 26 buckets, bf16, in a traced step, 2026-11-24: 2.25 TB/s (75 % of the copy rate)
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "rule.cuh"

KERNEL __launch_bounds__(THREADS, HELD)
adamw_kernel(real *__restrict__ p,                              // (n)
             float *__restrict__ m, float *__restrict__ v,      // (n)
             short *__restrict__ low,                           // (n) or NULL
             const grad_t *__restrict__ grad,                   // (n)
             const float *factor, const StepScalars *scalars,   // (1) or NULL
             i64 n, i64 start, float eps, float weight_decay) {  // start: of the bucket in the flat vector, elements
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  const Rule rule(scalars, eps, weight_decay, factor ? factor[0] : 1.0);
  const Draws draws(scalars, WEIGHT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)gridDim.x * THREADS * 4) {
    Pack<grad_t, 4> g = read(grad, i, n);
    Pack<float, 4> first = read(m, i, n), second = read(v, i, n);
    Weights weight(p, low, i, n, start, draws);
#pragma unroll
    for (int k = 0; k < 4; k++) weight.set(k, rule.update(weight.at(k), first.v[k], second.v[k], g.at(k)));
    write(m, first, i, n);
    write(v, second, i, n);
    weight.write_to(p, low, i, n);
  }
}
