// lm_loss: the kernels around the exp GEMM (exp_gemm.cu)                                         math: README.md §8
// shift     writes =          shift: (ROWS) float                the target's logit; of target 0 in ignored rows
// scale     writes =          losses: (ROWS) float, nats;  factor: (ROWS) float = loss_scale / sum, 0 in ignored rows
//                             scaled: (ROWS, C) bf16 = factor x
//           writes +=         p: (ROWS, VP) bf16                 p[target] -= sum of the row
// dx        writes =          dx: (ROWS, C) bf16                 dx *= factor
// ignored   a row whose target is ignore_index has loss 0 and gradient 0
// numerics  float inside. A row whose sum exceeds LIMIT (a loss above 69 nats) is recomputed from x and w with its
//           maximum subtracted: slow but right. A NaN logit gives a NaN loss
// layout    a warp per row, 16-byte accesses; scale: a block has 32 rows, whose sums it reads together
// determinism  fixed order
// speed     bound by x, scaled and dx: 5 passes over 2 C bytes a row, and 4 TILES bytes of sums
// source    own work
#include "ptx.cuh"

// -DROWS of this chunk, -DC, -DV columns that count, -DVP all columns, -DTILES of columns in sums, -DWARPS of a block
#if !defined(ROWS) || !defined(C) || !defined(V) || !defined(VP) || !defined(TILES) || !defined(WARPS)
#error "lm_loss/op.py defines these"
#endif
enum { VEC = 8 };
#define LOG2E 1.4426950408889634f
#define LIMIT 1e30f

__device__ __forceinline__ float dot(const real *x, const real *w) {  // over C, the same in all lanes
  float sum = 0.0f;
  for (int i = threadIdx.x % 32 * VEC; i < C; i += 32 * VEC) {
    Pack<real, VEC> a = load<real, VEC>(x + i), b = load<real, VEC>(w + i);
#pragma unroll
    for (int q = 0; q < VEC; q++) sum = fmaf(a.at(q), b.at(q), sum);
  }
  return warp_reduce(sum, Sum());
}

KERNEL __launch_bounds__(32 * WARPS) lm_loss_shift_kernel(
    float *shift,        // (ROWS)
    const real *x,       // (ROWS, C)
    const real *w,       // (VP, C)
    const int *targets,  // (ROWS)
    i64 ignore_index) {
  i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= ROWS) return;
  int target = targets[row] == ignore_index ? 0 : targets[row];
  float z = dot(x + row * C, w + (i64)target * C);
  if (threadIdx.x % 32 == 0) shift[row] = z;
}

// Recomputes a row with its maximum as the shift; returns the maximum and the sum.
__device__ __noinline__ float2 recompute(real *p, const real *x, const real *w) {
  int lane = threadIdx.x % 32;
  float sum = 0.0f, top = -HG_INF;
  for (int v = 0; v < V; v++) {
    real z = from_float<real>(dot(x, w + (i64)v * C));
    top = fmaxf(top, to_float(z));
    if (lane == 0) p[v] = z;
  }
  __syncwarp();
  for (int v = lane; v < V; v += 32) {
    float e = exp2_fast(LOG2E * (to_float(p[v]) - top));
    sum += e;
    p[v] = from_float<real>(e);
  }
  sum = warp_reduce(sum, Sum());
  __syncwarp();
  return make_float2(top, sum);
}

KERNEL __launch_bounds__(32 * WARPS) lm_loss_scale_kernel(
    float *losses,       // (ROWS)
    real *p,             // (ROWS, VP)
    real *scaled,        // (ROWS, C)
    float *factor,       // (ROWS)
    const float *sums,   // (TILES, ROWS)
    const float *shift,  // (ROWS)
    const real *x,       // (ROWS, C)
    const real *w,       // (VP, C)
    const int *targets,  // (ROWS)
    const StepScalars *scalars,
    i64 ignore_index) {
  __shared__ float parts[WARPS * 32];  // (warp, row)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  i64 first = (i64)blockIdx.x * 32;
  float part = 0.0f;
  for (int i = warp; i < TILES; i += WARPS)
    if (first + lane < ROWS) part += sums[(i64)i * ROWS + first + lane];
  parts[threadIdx.x] = part;
  __syncthreads();
  for (int r = warp; r < 32 && first + r < ROWS; r += WARPS) {
    i64 row = first + r;
    bool counts = targets[row] != ignore_index;
    float sum = 0.0f, top = 0.0f;  // of the exponents: the target's logit is the shift
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[i * 32 + r];
    if (!(sum < LIMIT)) {
      float2 made = recompute(p + row * VP, x + row * C, w);
      top = made.x - shift[row];
      sum = made.y;
    }
    float f = counts ? scalars->loss_scale / sum : 0.0f;
    if (lane == 0) {
      losses[row] = counts ? logf(sum) + top : 0.0f;
      factor[row] = f;
      if (counts) p[row * VP + targets[row]] = from_float<real>(to_float(p[row * VP + targets[row]]) - sum);
    }
    for (int i = lane * VEC; i < C; i += 32 * VEC) {
      Pack<real, VEC> v = load<real, VEC>(x + row * C + i);
#pragma unroll
      for (int q = 0; q < VEC; q++) v.set(q, v.at(q) * f);
      store(scaled + row * C + i, v);
    }
  }
}

KERNEL __launch_bounds__(32 * WARPS) lm_loss_dx_kernel(
    real *dx,            // (ROWS, C)
    const float *factor  // (ROWS)
) {
  i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= ROWS) return;
  float f = factor[row];
  for (int i = threadIdx.x % 32 * VEC; i < C; i += 32 * VEC) {
    Pack<real, VEC> v = load<real, VEC>(dx + row * C + i);
#pragma unroll
    for (int q = 0; q < VEC; q++) v.set(q, v.at(q) * f);
    store(dx + row * C + i, v);
  }
}
