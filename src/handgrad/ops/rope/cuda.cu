// rope: y = qkv with every head of q and k normed (if there is a weight), then rotated        math: README.md §2, §3
// forward   writes =  y: (N, (H + 2 K) D) dtype; without norms the backward is the same with SIGN = -1
// backward  writes =  dqkv: (N, (H + 2 K) D) dtype;  = or += dwq, dwk: (D) grad_t
// numerics  norm and rotation in f32, rounded once; the backward recomputes rstd
// layout    LANES lanes share a head; a lane holds units of two packs of VEC elements, so that both elements of a pair
//           are its own. Backward with norms: a grid that fills the GPU walks over heads; a lane sums dwq and dwk of its
//           columns in registers
// determinism  fixed order: heads of a group, groups of a block, then blocks (rope_backward_sum); no atomics
// speed     not measured yet
// source    own work
#include "kernel.cuh"

// -DD            elements of a head
// -DROTARY       of which the first that many rotate: R
// -DVEC          elements of one access: R and D are multiples of two accesses, or it is 1
// -DLANES        lanes that share a head, a power of two
// -DQUERIES, -DKEYS, -DHEADS   H, K, H + 2 K
// -DINTERLEAVED  1: pairs (2 i, 2 i + 1); 0: pairs (i, i + R / 2)
// -DTHREADS      of a block
#if !defined(D) || !defined(ROTARY) || !defined(VEC) || !defined(LANES) || !defined(QUERIES) || !defined(KEYS)
#error "rope/op.py defines these"
#endif
#if !defined(HEADS) || !defined(INTERLEAVED) || !defined(THREADS) || !defined(SUMS)
#error "rope/op.py defines these"
#endif
constexpr int UNITS = (D + 2 * VEC - 1) / (2 * VEC), PER = (UNITS + LANES - 1) / LANES, GROUPS = THREADS / LANES;
constexpr int ROTATED = ROTARY / (2 * VEC);  // units that rotate
constexpr u32 FULL = 0xffffffffu;
typedef Pack<real, VEC> Pk;

// First columns of the packs of unit u. The second is outside the head at most in the last unit, if D is odd.
__device__ __forceinline__ int column(int u, int pack) {
  return INTERLEAVED || u >= ROTATED ? (2 * u + pack) * VEC : u * VEC + pack * (ROTARY / 2);
}
__device__ __forceinline__ bool inside(int u, int pack) {
  return (UNITS % LANES == 0 || u < UNITS) && (D % 2 == 0 || column(u, pack) < D);
}
// Unit of a lane.
__device__ __forceinline__ int unit(int k, int lane) { return k * LANES + lane; }

template <bool streaming>
__device__ __forceinline__ void load_head(float (&x)[PER][2 * VEC], const real *head, int lane) {
#pragma unroll
  for (int k = 0; k < PER; k++)
#pragma unroll
    for (int pack = 0; pack < 2; pack++) {
      Pk p = {};
      int u = unit(k, lane);
      if (inside(u, pack)) {
        if constexpr (streaming) p = load_streaming<real, VEC>(head + column(u, pack));
        else p = load<real, VEC>(head + column(u, pack));
      }
#pragma unroll
      for (int i = 0; i < VEC; i++) x[k][pack * VEC + i] = p.at(i);
    }
}

__device__ __forceinline__ void store_head(real *head, const float (&x)[PER][2 * VEC], int lane) {
#pragma unroll
  for (int k = 0; k < PER; k++)
#pragma unroll
    for (int pack = 0; pack < 2; pack++) {
      int u = unit(k, lane);
      if (!inside(u, pack)) continue;
      Pk p;
#pragma unroll
      for (int i = 0; i < VEC; i++) p.set(i, x[k][pack * VEC + i]);
      store(head + column(u, pack), p);
    }
}

// Turns a lane's pairs by their angles (sign 1) or back (-1). angle (R): cosines, then sines.
__device__ __forceinline__ void rotate(float (&x)[PER][2 * VEC], const float *angle, float sign, int lane) {
#pragma unroll
  for (int k = 0; k < PER; k++) {
    int u = unit(k, lane);
    if (u >= ROTATED) continue;
    Pack<float, VEC> cosine = load<float, VEC>(angle + u * VEC), sine = load<float, VEC>(angle + ROTARY / 2 + u * VEC);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      constexpr int step = INTERLEAVED ? 2 : 1, apart = INTERLEAVED ? 1 : VEC;
      float a = x[k][i * step], b = x[k][i * step + apart], s = sign * sine.at(i);
      x[k][i * step] = a * cosine.at(i) - b * s;
      x[k][i * step + apart] = b * cosine.at(i) + a * s;
    }
  }
}

// The sum over a head, in all its lanes.
__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
  for (int lanes = LANES / 2; lanes; lanes >>= 1) x += __shfl_xor_sync(FULL, x, lanes);
  return x;
}

#if !SUMS
// -DSIGN  1; -1: rotates back
// -DNORM  1: wq or wk is given
#if !defined(SIGN) || !defined(NORM)
#error "rope/op.py defines these"
#endif
KERNEL __launch_bounds__(THREADS)
rope_kernel(real *__restrict__ y,                                      // (N, HEADS, D)
            const real *__restrict__ qkv,                              // (N, HEADS, D), not read again soon
            const float *__restrict__ table,                           // (S, R)
            const real *__restrict__ wq, const real *__restrict__ wk,  // (D) or NULL
            const StepScalars *scalars, i64 N, i64 T, float eps, i64 decode) {
  const int lane = threadIdx.x % LANES;
  // from the last head to the first: what wrote qkv wrote the last rows last, so that part of them is in L2
  u32 item = (gridDim.x - 1 - blockIdx.x) * GROUPS + threadIdx.x / LANES;
  const bool exists = item < (u32)N * HEADS;
  if (!exists) item = 0;  // its lanes take part in the sums of their warp
  const u32 n = item / HEADS, h = item % HEADS;
  float x[PER][2 * VEC];
  load_head<true>(x, qkv + (i64)item * D, lane);
  if constexpr (NORM) {
    float squares = 0.0f, scale[PER][2 * VEC];
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
      for (int i = 0; i < 2 * VEC; i++) squares += x[k][i] * x[k][i];
    const float rstd = 1.0f / sqrtf(head_sum(squares) / D + eps);
    const real *w = h < QUERIES ? wq : h < QUERIES + KEYS ? wk : nullptr;
    if (w) {
      load_head<false>(scale, w, lane);
#pragma unroll
      for (int k = 0; k < PER; k++)
#pragma unroll
        for (int i = 0; i < 2 * VEC; i++) x[k][i] = x[k][i] * rstd * scale[k][i];
    }
  }
  if (h < QUERIES + KEYS) {
    const i64 position = n % (u32)T + (decode ? scalars->position : 0);  // in decode after what is in the cache
    rotate(x, table + position * ROTARY, SIGN, lane);
  }
  if (exists) store_head(y + (i64)item * D, x, lane);
}
#else
// -DBLOCKS         of the grid
// -DBLOCKS_PER_SM  which bounds registers
// -DSUM_THREADS    of a block of rope_backward_sum_kernel: 32 x 32
#if !defined(BLOCKS) || !defined(BLOCKS_PER_SM) || !defined(SUM_THREADS)
#error "rope/op.py defines these"
#endif
// x, dn: a head and the gradient of its norm's output before the weight w. Adds to dw; dn becomes the gradient of x.
__device__ __forceinline__ void norm_backward(float (&dn)[PER][2 * VEC], float (&dwq)[PER][2 * VEC],
                                              float (&dwk)[PER][2 * VEC], const float (&x)[PER][2 * VEC],
                                              const real *w, bool is_query, float eps, int lane) {
  float squares = 0.0f, dot = 0.0f, scale[PER][2 * VEC] = {}, kept[PER][2 * VEC];
  if (w) load_head<false>(scale, w, lane);
#pragma unroll
  for (int k = 0; k < PER; k++)
#pragma unroll
    for (int i = 0; i < 2 * VEC; i++) {
      kept[k][i] = dn[k][i] * scale[k][i];
      squares += x[k][i] * x[k][i];
      dot += kept[k][i] * x[k][i];
    }
  const float rstd = 1.0f / sqrtf(head_sum(squares) / D + eps);
  dot = head_sum(dot) * rstd / D;
  if (!w) return;
#pragma unroll
  for (int k = 0; k < PER; k++)
#pragma unroll
    for (int i = 0; i < 2 * VEC; i++) {
      float normed = x[k][i] * rstd, add = dn[k][i] * normed;
      dwq[k][i] += is_query ? add : 0.0f;  // without a branch between the arrays, so that both stay in registers
      dwk[k][i] += is_query ? 0.0f : add;
      dn[k][i] = rstd * (kept[k][i] - normed * dot);
    }
}

KERNEL __launch_bounds__(THREADS, BLOCKS_PER_SM)
rope_backward_kernel(real *__restrict__ dqkv,                                   // (N, HEADS, D)
                     float *__restrict__ partial,                               // (BLOCKS, 2, D): dwq, dwk
                     const real *__restrict__ dy, const real *__restrict__ qkv,  // (N, HEADS, D)
                     const float *__restrict__ table,                           // (S, R)
                     const real *__restrict__ wq, const real *__restrict__ wk,  // (D) or NULL
                     i64 N, i64 T, float eps) {
  HG_SHARED(float, shared);  // (GROUPS, 2, D)
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const u32 items = (u32)N * HEADS;
  float dwq[PER][2 * VEC] = {}, dwk[PER][2 * VEC] = {};
  for (u32 first = blockIdx.x * GROUPS; first < items; first += BLOCKS * GROUPS) {
    const u32 item = first + group < items ? first + group : first, n = item / HEADS, h = item % HEADS;
    const real *w = h < QUERIES ? wq : h < QUERIES + KEYS ? wk : nullptr;
    const bool exists = item == first + group;
    if (!exists) w = nullptr;
    float dn[PER][2 * VEC], x[PER][2 * VEC] = {};
    load_head<true>(dn, dy + (i64)item * D, lane);
    if (w) load_head<true>(x, qkv + (i64)item * D, lane);
    if (h < QUERIES + KEYS) rotate(dn, table + (i64)(n % (u32)T) * ROTARY, -1.0f, lane);
    norm_backward(dn, dwq, dwk, x, w, h < QUERIES, eps, lane);
    if (exists) store_head(dqkv + (i64)item * D, dn, lane);
  }
#pragma unroll
  for (int k = 0; k < PER; k++)
#pragma unroll
    for (int i = 0; i < 2 * VEC; i++) {
      int u = unit(k, lane), c = column(u, i / VEC) + i % VEC;
      if (!inside(u, i / VEC)) continue;
      shared[group * 2 * D + c] = dwq[k][i];
      shared[(group * 2 + 1) * D + c] = dwk[k][i];
    }
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * D; c += THREADS) {
    float sum = 0.0f;
    for (int g = 0; g < GROUPS; g++) sum += shared[g * 2 * D + c];
    partial[(i64)blockIdx.x * 2 * D + c] = sum;
  }
}

// dwq, dwk = or += the sums of all blocks. Of 32 x 32 threads, x is a column of (2, D), and y takes every 32nd block.
KERNEL __launch_bounds__(SUM_THREADS)
rope_backward_sum_kernel(grad_t *__restrict__ dwq, grad_t *__restrict__ dwk,  // (D) or NULL
                         const float *__restrict__ partial,                   // (BLOCKS, 2, D)
                         i64 accumulate_dwq, i64 accumulate_dwk) {
  __shared__ float buffer[32][33];
  int x = threadIdx.x % 32, y = threadIdx.x / 32, c = blockIdx.x * 32 + x;
  float sum = 0.0f;
  if (c < 2 * D)
#pragma unroll 8
    for (i64 k = y; k < BLOCKS; k += 32) sum += partial[k * 2 * D + c];
  buffer[y][x] = sum;
  __syncthreads();
  sum = warp_reduce(buffer[x][y], Sum());  // now a warp a column
  c = blockIdx.x * 32 + y;
  grad_t *dw = c < D ? dwq : dwk;
  if (x > 0 || c >= 2 * D || !dw) return;
  grad_t *to = dw + c % D;
  *to = from_float<grad_t>((c < D ? accumulate_dwq : accumulate_dwk) ? to_float(*to) + sum : sum);
}
#endif
