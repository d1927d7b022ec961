// attention and its gradient in float32, with plain multiply-adds                            math: README.md §2, §3, §7
// forward   writes =  y: (N, H D) f32;  lse: (B, H, T) f32
// backward  writes =  dqkv: (N, (H + 2 K) D) f32, in two launches: dq and rowsums of dy y, then dk and dv
// numerics  everything in f32
// layout    a block owns 32 rows, a warp 8 of them, and streams tiles of 32 rows. In a matmul over D each lane computes
//           one streamed row, in a matmul over rows every 32nd element of D
// determinism  fixed order, no atomics: always the same bits
// speed     not measured yet; meant for checks and for training in float32
// source    own work, after Dao 2023 (FlashAttention-2), algorithms 1 and 2
//
// Defines (op.py): D, CAUSAL, DROPOUT, THREADS, ROWS (of a block, and of a streamed tile: 32, one for each lane),
// LD (elements of a row in shared memory: odd, so that 32 rows lie in 32 banks).
#include "kernel.cuh"
#if !defined(D) || !defined(CAUSAL) || !defined(DROPOUT) || !defined(THREADS) || !defined(ROWS) || !defined(LD)
#error "attention/op.py defines these"
#endif

#define OWN (ROWS * 32 / THREADS)  // rows of a warp
#define PER ((D + 31) / 32)        // elements of D that a lane holds
#define FULL 0xffffffffu

// tile (ROWS, LD) = rows first .. of x (.., D), zeros past the end
__device__ __forceinline__ void load_tile(float *tile, const float *x, i64 stride, int first, int end) {
  for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
    int r = i / D, c = i % D;
    tile[r * LD + c] = first + r < end ? x[(first + r) * stride + c] : 0.0f;
  }
}

// s[r] = row r of a . row `lane` of b
__device__ __forceinline__ void scores(float (&s)[OWN], const float *a, const float *b) {
  b += threadIdx.x % 32 * LD;
#pragma unroll
  for (int r = 0; r < OWN; r++) s[r] = 0.0f;
  for (int d = 0; d < D; d++)
#pragma unroll
    for (int r = 0; r < OWN; r++) s[r] += a[r * LD + d] * b[d];
}

// o (OWN, D) += s (OWN, ROWS) b (ROWS, D)
__device__ __forceinline__ void pv_gemm(float (&o)[OWN][PER], const float (&s)[OWN], const float *b) {
  int lane = threadIdx.x % 32;
  for (int j = 0; j < ROWS; j++, b += LD) {
    float p[OWN];
#pragma unroll
    for (int r = 0; r < OWN; r++) p[r] = __shfl_sync(FULL, s[r], j);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float x = i * 32 + lane < D ? b[i * 32 + lane] : 0.0f;
#pragma unroll
      for (int r = 0; r < OWN; r++) o[r][i] += p[r] * x;
    }
  }
}

__device__ __forceinline__ void clear(float (&o)[OWN][PER]) {
#pragma unroll
  for (int i = 0; i < OWN * PER; i++) o[i / PER][i % PER] = 0.0f;
}

// rows first .. of y (.., D) = o times a scale for each row
__device__ __forceinline__ void store_rows(float *y, i64 stride, int first, int end, const float (&o)[OWN][PER],
                                           const float (&scale)[OWN]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < OWN; r++)
#pragma unroll
    for (int i = 0; i < PER; i++)
      if (first + r < end && i * 32 + lane < D) y[(first + r) * stride + i * 32 + lane] = o[r][i] * scale[r];
}

// The factor of a probability: 0 or the scale.
__device__ __forceinline__ float factor(const DropoutRule &rule, i64 element) {
  if constexpr (!DROPOUT) return 1.0f;
  uint4 r = rule.bits(element / 4);
  int lane = element % 4;
  return rule.factor(lane == 0 ? r.x : lane == 1 ? r.y : lane == 2 ? r.z : r.w);
}

// Blocks of one head are neighbours, so that what they stream stays in L2.
#define PLACE(heads)                                                                                          \
  HG_SHARED(float, shared);                                                                                     \
  const int T = (int)T_, blocks = (T + ROWS - 1) / ROWS, head = blockIdx.x / blocks, lane = threadIdx.x % 32; \
  const int own_tile = threadIdx.x / 32 * OWN, row0 = blockIdx.x % blocks * ROWS, own = row0 + own_tile;      \
  const int b = head / (int)heads;                                                                            \
  const i64 stride = (H + 2 * K) * D;                                                                         \
  const float scale = rsqrtf((float)D);                                                                       \
  const DropoutRule rule(scalars, p, stream)

KERNEL __launch_bounds__(THREADS, 2) attention_forward_simt_kernel(
    float *y,           // (N, H D)
    float *lse,         // (B, H, T)
    const float *qkv,   // (N, H + 2 K, D)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  PLACE(H);
  float *q_tile = shared, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD;
  const int h = head % (int)H, end = CAUSAL ? min(T, row0 + ROWS) : T;
  const float *q = qkv + b * T * stride + h * D, *k = q + (H - h + h / (H / K)) * D, *v = k + K * D;
  float o[OWN][PER], top[OWN], sum[OWN];
  clear(o);
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    top[r] = -HG_INF;
    sum[r] = 0.0f;
  }
  load_tile(q_tile, q, stride, row0, T);
  for (int key0 = 0; key0 < end; key0 += ROWS) {
    __syncthreads();
    load_tile(k_tile, k, stride, key0, T);
    load_tile(v_tile, v, stride, key0, T);
    __syncthreads();
    const int key = key0 + lane;
    float s[OWN];
    scores(s, q_tile + own_tile * LD, k_tile);
#pragma unroll
    for (int r = 0; r < OWN; r++) {
      float z = key < T && (!CAUSAL || key <= own + r) ? s[r] * scale : -HG_INF;
      float higher = fmaxf(top[r], warp_reduce(z, Max())), shrink = expf(top[r] - higher);
      s[r] = expf(z - higher);
      top[r] = higher;
      sum[r] = sum[r] * shrink + s[r];
      s[r] *= factor(rule, ((i64)head * T + own + r) * T + key);
#pragma unroll
      for (int i = 0; i < PER; i++) o[r][i] *= shrink;
    }
    pv_gemm(o, s, v_tile);
  }
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    float total = warp_reduce(sum[r], Sum());
    if (lane == 0 && own + r < T) lse[(i64)head * T + own + r] = top[r] + logf(total);
    sum[r] = 1.0f / total;
  }
  store_rows(y + (b * T * H + h) * D, H * D, own, T, o, sum);
}

struct Stat { float lse, delta; };  // of a query row; delta: rowsum of dy y

KERNEL __launch_bounds__(THREADS, 2) attention_backward_dq_simt_kernel(
    float *dqkv,        // (N, H + 2 K, D): the first H
    Stat *stats,        // (B, H, T)
    const float *dy,    // (N, H D)
    const float *qkv,   // (N, H + 2 K, D)
    const float *y,     // (N, H D)
    const float *lse,   // (B, H, T)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  PLACE(H);
  float *q_tile = shared, *dy_tile = q_tile + ROWS * LD, *k_tile = dy_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD;
  const int h = head % (int)H, end = CAUSAL ? min(T, row0 + ROWS) : T;
  const i64 start = b * T * stride + h * D, start_y = (b * T * H + h) * D;
  const float *k = qkv + start + (H - h + h / (H / K)) * D, *v = k + K * D;
  float dq[OWN][PER], base[OWN], mean[OWN];
  clear(dq);
  load_tile(q_tile, qkv + start, stride, row0, T);
  load_tile(dy_tile, dy + start_y, H * D, row0, T);
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    const int row = min(own + r, T - 1);  // past the end there is nothing to write, only nothing to read
    const i64 at = start_y + row * H * D;
    float part = 0.0f;
    for (int d = lane; d < D; d += 32) part += dy[at + d] * y[at + d];
    mean[r] = warp_reduce(part, Sum());
    base[r] = lse[(i64)head * T + row];
    if (lane == 0 && own + r < T) stats[(i64)head * T + row] = {base[r], mean[r]};
  }
  for (int key0 = 0; key0 < end; key0 += ROWS) {
    __syncthreads();
    load_tile(k_tile, k, stride, key0, T);
    load_tile(v_tile, v, stride, key0, T);
    __syncthreads();
    const int key = key0 + lane;
    float s[OWN], ds[OWN];
    scores(s, q_tile + own_tile * LD, k_tile);
    scores(ds, dy_tile + own_tile * LD, v_tile);
#pragma unroll
    for (int r = 0; r < OWN; r++) {
      float prob = key < T && (!CAUSAL || key <= own + r) ? expf(s[r] * scale - base[r]) : 0.0f;
      ds[r] = prob * (ds[r] * factor(rule, ((i64)head * T + own + r) * T + key) - mean[r]);
    }
    pv_gemm(dq, ds, k_tile);
  }
#pragma unroll
  for (int r = 0; r < OWN; r++) mean[r] = scale;
  store_rows(dqkv + start, stride, own, T, dq, mean);
}

KERNEL __launch_bounds__(THREADS, 2) attention_backward_dkdv_simt_kernel(
    float *dqkv,         // (N, H + 2 K, D): the last 2 K
    const Stat *stats,   // (B, H, T)
    const float *dy,     // (N, H D)
    const float *qkv,    // (N, H + 2 K, D)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  PLACE(K);
  float *k_tile = shared, *v_tile = k_tile + ROWS * LD, *q_tile = v_tile + ROWS * LD, *dy_tile = q_tile + ROWS * LD;
  const int group = (int)(H / K), head0 = head % (int)K * group;
  const i64 start = b * T * stride + (H + head % K) * D;
  float dk[OWN][PER], dv[OWN][PER];
  clear(dk);
  clear(dv);
  load_tile(k_tile, qkv + start, stride, row0, T);
  load_tile(v_tile, qkv + start + K * D, stride, row0, T);
  for (int h = head0; h < head0 + group; h++)
    for (int query0 = CAUSAL ? row0 : 0; query0 < T; query0 += ROWS) {
      __syncthreads();
      load_tile(q_tile, qkv + b * T * stride + h * D, stride, query0, T);
      load_tile(dy_tile, dy + (b * T * H + h) * D, H * D, query0, T);
      __syncthreads();
      const int query = query0 + lane;
      const Stat stat = stats[(b * H + h) * T + min(query, T - 1)];
      float s[OWN], ds[OWN];
      scores(s, k_tile + own_tile * LD, q_tile);
      scores(ds, v_tile + own_tile * LD, dy_tile);
#pragma unroll
      for (int r = 0; r < OWN; r++) {
        float prob = query < T && (!CAUSAL || query >= own + r) ? expf(s[r] * scale - stat.lse) : 0.0f;
        float kept = factor(rule, ((b * H + h) * T + query) * T + own + r);
        ds[r] = prob * (ds[r] * kept - stat.delta);
        s[r] = prob * kept;
      }
      pv_gemm(dv, s, dy_tile);
      pv_gemm(dk, ds, q_tile);
    }
  float scales[OWN];
#pragma unroll
  for (int r = 0; r < OWN; r++) scales[r] = scale;
  store_rows(dqkv + start, stride, own, T, dk, scales);
#pragma unroll
  for (int r = 0; r < OWN; r++) scales[r] = 1.0f;
  store_rows(dqkv + start + K * D, stride, own, T, dv, scales);
}
