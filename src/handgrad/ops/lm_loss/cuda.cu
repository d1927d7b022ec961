// lm_loss: losses and, in place, gradients of a chunk of logits; the library computes GEMMs    math: README.md §2
// rows      writes =          losses: (ROWS) float, nats;  logits: (ROWS, VP) dtype, x w^T before, its gradients
//                             after, if GRADIENT.  Gradients carry scalars->loss_scale, losses do not
// columns   V..VP are padding: probability 0, gradient 0
// ignored   a row whose target is ignore_index has loss 0 and gradient 0
// numerics  logits with a bias, a scale or a cap are rounded to dtype again. The maximum is subtracted; 2^x to 2 units
//           in the last place; sums in float; a NaN logit gives a NaN loss
// layout    a block walks over rows, a thread over packs of VEC columns: for the maximum, the sum and the gradient.
//           With AHEAD the row is in shared memory and the next one is being copied there, so that logits are read
//           once and written once; without (the row is too long) the second and third read come from L2
// determinism  fixed order: a thread's columns, then the block's threads
// speed     H100 80GB, N=65536 C=768 Vp=50304 bf16, in a traced step, 2026-11-24: 641 TFLOP/s for the whole op (65 % of
//           the peak); this kernel alone is not measured yet
// source    own work
#include "ptx.cuh"

// -DV columns that count, -DVP all columns, -DROWS of this chunk, -DTHREADS of a block, -DVEC elements of an access,
// -DAHEAD 1: rows are prefetched into shared memory, -DGRADIENT 1: logits become their gradients
// -DBIAS, -DSCALED, -DCAPPED, -DWEIGHTED 1: the call has a b, a scale that is not 1, a softcap, weights
#if !defined(V) || !defined(VP) || !defined(ROWS) || !defined(THREADS) || !defined(VEC) || !defined(AHEAD) || \
    !defined(GRADIENT) || !defined(BIAS) || !defined(SCALED) || !defined(CAPPED) || !defined(WEIGHTED)
#error "lm_loss/op.py defines these"
#endif
enum { PACKS = VP / VEC, STEPS = (PACKS + THREADS - 1) / THREADS, UNROLL = AHEAD ? STEPS : 4 };
#define LOG2E 1.4426950408889634f

// A thread's pack of columns at one step; only the last one may lie past the end of the row.
__device__ __forceinline__ int first_column(int step) { return (step * THREADS + (int)threadIdx.x) * VEC; }
__device__ __forceinline__ bool exists(int step) { return (step + 1) * THREADS <= PACKS || first_column(step) < VP; }

// Its logits. Padding, and columns past the end of the row, are -inf.
__device__ __forceinline__ Pack<real, VEC> columns(const real *row, int step) {
  Pack<real, VEC> x = {};
  if (exists(step)) x = load<real, VEC>(row + first_column(step));
  if ((step + 1) * THREADS * VEC > V) {
#pragma unroll
    for (int q = 0; q < VEC; q++)
      if (first_column(step) + q >= V) x.set(q, -HG_INF);
  }
  return x;
}

// Starts to copy a row. A thread copies only what it will read, so it needs no barrier.
__device__ __forceinline__ void fetch(real *to, const real *row) {
#if AHEAD
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    if (exists(s)) copy_async(to + first_column(s), row + first_column(s));
#endif
}

// In place, from x w^T: z = softcap tanh(scale (x w^T + b) / softcap). A thread does this to the columns that it reads.
__device__ __forceinline__ void finish(real *row, const real *b, float scale, float softcap) {
#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
    if (!exists(s)) break;
    Pack<real, VEC> x = load<real, VEC>(row + first_column(s)), bias = {};
    if (BIAS) bias = load<real, VEC>(b + first_column(s));
#pragma unroll
    for (int q = 0; q < VEC; q++) {
      float z = (x.at(q) + bias.at(q)) * scale;
      x.set(q, CAPPED ? softcap * tanhf(z / softcap) : z);
    }
    store(row + first_column(s), x);
  }
}

// dz / d(x w^T) at a logit z; 0 where z is padding, or rounded to more than softcap.
__device__ __forceinline__ float slope(float z, float scale, float softcap) {
  float t = CAPPED ? z / softcap : 0.0f;
  return (SCALED ? scale : 1.0f) * fmaxf(1.0f - t * t, 0.0f);
}

KERNEL __launch_bounds__(THREADS, 1) lm_loss_rows_kernel(
    float *losses,         // (ROWS)
    real *logits,          // (ROWS, VP)
    const int *targets,    // (ROWS)
    const real *b,         // (VP) or NULL
    const float *weights,  // (ROWS) or NULL
    const StepScalars *scalars,
    i64 ignore_index, float scale, float softcap) {
  __shared__ float buffer[THREADS / 32];
#if AHEAD
  HG_SHARED(real, rows);  // (2, VP): this row and the next
  fetch(rows, logits + (i64)blockIdx.x * VP);
  copy_async_commit();
#endif
  int target = targets[blockIdx.x];
  for (int row = blockIdx.x, turn = 0; row < ROWS; row += gridDim.x, turn ^= 1) {
    int next = row + gridDim.x, next_target = next < ROWS ? targets[next] : 0;
#if AHEAD
    if (next < ROWS) fetch(rows + (turn ^ 1) * VP, logits + (i64)next * VP);
    copy_async_commit();
    copy_async_wait<1>();
    real *from = rows + turn * VP;
#else
    real *from = logits + (i64)row * VP;
#endif
#if GRADIENT
    real *gradient = logits + (i64)row * VP;
#endif
    if (target == ignore_index) {
      if (threadIdx.x == 0) losses[row] = 0.0f;
#if GRADIENT
#pragma unroll UNROLL
      for (int s = 0; s < STEPS; s++)
        if (exists(s)) store(gradient + first_column(s), Pack<real, VEC>{});
#endif
    } else {
      if (BIAS || SCALED || CAPPED) finish(from, b, scale, softcap);
      float weight = WEIGHTED ? weights[row] : 1.0f;
      bool mine = target / VEC % THREADS == (int)threadIdx.x;  // the target is one of this thread's columns
      float picked = mine ? to_float(from[target]) : 0.0f;
      float top = -HG_INF, sum = 0.0f;
#pragma unroll UNROLL
      for (int s = 0; s < STEPS; s++) {
        Pack<real, VEC> x = columns(from, s);
#pragma unroll
        for (int q = 0; q < VEC; q++) top = fmaxf(top, x.at(q));
      }
      top = LOG2E * block_reduce<THREADS>(top, Max(), -HG_INF, buffer);  // e^(x - max) as 2^(x log2(e) - top)
#pragma unroll UNROLL
      for (int s = 0; s < STEPS; s++) {
        Pack<real, VEC> x = columns(from, s);
#pragma unroll
        for (int q = 0; q < VEC; q++) sum += exp2_fast(fmaf(x.at(q), LOG2E, -top));
      }
      sum = block_reduce<THREADS>(sum, Sum(), 0.0f, buffer);
      if (mine) losses[row] = weight * ((top + log2f(sum)) * 0.6931471805599453f - picked);

#if GRADIENT
      float total = scalars->loss_scale * weight, factor = total / sum;
#pragma unroll UNROLL
      for (int s = 0; s < STEPS; s++) {
        Pack<real, VEC> x = columns(from, s);
#pragma unroll
        for (int q = 0; q < VEC; q++) {
          float p = exp2_fast(fmaf(x.at(q), LOG2E, -top)) * factor;
          x.set(q, SCALED || CAPPED ? p * slope(x.at(q), scale, softcap) : p);
        }
        if (exists(s)) store(gradient + first_column(s), x);
      }
      if (mine) {
        float p = (exp2_fast(fmaf(picked, LOG2E, -top)) / sum - 1.0f) * total;
        gradient[target] = from_float<real>(SCALED || CAPPED ? p * slope(picked, scale, softcap) : p);
      }
#endif
    }
    target = next_target;
  }
}
