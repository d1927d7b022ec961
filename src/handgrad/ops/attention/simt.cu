// attention and its gradient in float32, with plain multiply-adds                            math: README.md §2, §3, §7
// forward   writes =  y: (N, H D) f32;  lse: (B, H, T) f32
// backward  writes =  dqkv: (N, (H + 2 K) D) f32, or dqkv and dkv, in two launches: dq, rowsums of dy y and sums for
//           drel, then dk and dv
// numerics  everything in f32
// layout    a block owns 32 rows, a warp 8 of them, and streams tiles of 32 rows. In a matmul over D each lane computes
//           one streamed row, in a matmul over rows every 32nd element of D
// determinism  fixed order, no atomics: always the same bits
// speed     not measured yet; meant for checks and for training in float32
// source    own work, after Dao 2023 (FlashAttention-2), algorithms 1 and 2
//
// Defines (op.py): those of visible.cuh, DROPOUT, THREADS, ROWS (of a block, and of a streamed tile: 32, one for each
// lane), LD (elements of a row in shared memory: odd, so that 32 rows lie in 32 banks).
#include "visible.cuh"
#if !defined(D) || !defined(DROPOUT) || !defined(THREADS) || !defined(ROWS) || !defined(LD)
#error "attention/op.py defines these"
#endif

#define OWN (ROWS * 32 / THREADS)  // rows of a warp
#define PER ((D + 31) / 32)        // elements of D that a lane holds

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

// Blocks of one head are neighbours, so that what they stream stays in L2. A block owns rows of one of `heads` heads.
#define PLACE(heads, rows)                                                                                          \
  HG_SHARED(float, shared);                                                                                         \
  const View view(T_, S_, H_, K_, first_key, last_key);                                                             \
  const int T = view.T, S = view.S, H = view.H, K = view.K, blocks = ((rows) + ROWS - 1) / ROWS;                    \
  const int head = blockIdx.x / blocks, b = head / (heads), lane = threadIdx.x % 32;                                \
  const int own_tile = threadIdx.x / 32 * OWN, row0 = blockIdx.x % blocks * ROWS, own = row0 + own_tile;            \
  const DropoutRule rule(scalars, p, stream)

// Scores become scaled, with a bias.
__device__ __forceinline__ float scaled(float s, float scale, const float *bias, int distance) {
#if BUCKETS
  return s * scale + bias[near(distance)];
#else
  return s * scale;
#endif
}

KERNEL __launch_bounds__(THREADS, 2) attention_forward_simt_kernel(
    float *y,                  // (N, H D)
    float *lse,                // (B, H, T)
    const float *qkv,          // (N, H + 2 K, D); with kv (N, H, D)
    const float *kv,           // (M, 2 K, D)
    const float *rel,          // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  PLACE(H_, T_);
  float *q_tile = shared, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD;
  const int h = head % H;
  const float *k = (CROSS ? kv : qkv) + view.k_start(b, h / (H / K)), *v = k + K * D, *bias = nullptr;
  float o[OWN][PER], top[OWN], sum[OWN];
  clear(o);
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    top[r] = -HG_INF;
    sum[r] = 0.0f;
  }
#if BUCKETS
  __shared__ Biases biases;
  biases.load(rel, H, h);
  bias = biases.bias;
#endif
  load_tile(q_tile, qkv + view.q_start(b, h), view.q_stride(), row0, T);
  const Range seen = view.keys_of_block(b, row0);
  for (int key0 = seen.low / ROWS * ROWS; key0 <= seen.high; key0 += ROWS) {
    __syncthreads();
    load_tile(k_tile, k, view.kv_stride(), key0, S);
    load_tile(v_tile, v, view.kv_stride(), key0, S);
    __syncthreads();
    const int key = key0 + lane;
    float s[OWN];
    scores(s, q_tile + own_tile * LD, k_tile);
#pragma unroll
    for (int r = 0; r < OWN; r++) {
      const Range keys = view.keys(b, own + r);
      float z = keys.low <= key && key <= keys.high ? scaled(s[r], scale, bias, key - own - r) : -HG_INF;
      float higher = fmaxf(top[r], warp_reduce(z, Max()));
      float base = RANGES && higher == -HG_INF ? 0.0f : higher, shrink = expf(top[r] - base);  // -inf: no key so far
      s[r] = expf(z - base);
      top[r] = higher;
      sum[r] = sum[r] * shrink + s[r];
      s[r] *= factor(rule, ((i64)head * T + own + r) * S + key);
#pragma unroll
      for (int i = 0; i < PER; i++) o[r][i] *= shrink;
    }
    pv_gemm(o, s, v_tile);
  }
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    float total = warp_reduce(sum[r], Sum());
    bool sees = !RANGES || total > 0.0f;
    if (lane == 0 && own + r < T) lse[(i64)head * T + own + r] = sees ? top[r] + logf(total) : 0.0f;
    sum[r] = sees ? 1.0f / total : 0.0f;
  }
  store_rows(y + ((i64)b * T * H + h) * D, (i64)H * D, own, T, o, sum);
}

struct Stat { float lse, delta; };  // of a query row; delta: rowsum of dy y

KERNEL __launch_bounds__(THREADS, 2) attention_backward_dq_simt_kernel(
    float *dqkv,               // (N, H + 2 K, D): the first H; with kv (N, H, D)
    Stat *stats,               // (B, H, T)
    float *parts,              // (B, H, blocks, R): sums for drel
    const float *dy,           // (N, H D)
    const float *qkv,          // as dqkv
    const float *kv,           // (M, 2 K, D)
    const float *rel,          // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const float *y,            // (N, H D)
    const float *lse,          // (B, H, T)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  PLACE(H_, T_);
  float *q_tile = shared, *dy_tile = q_tile + ROWS * LD, *k_tile = dy_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD;
  const int h = head % H;
  const i64 start_y = ((i64)b * T * H + h) * D, row_y = (i64)H * D;
  const float *k = (CROSS ? kv : qkv) + view.k_start(b, h / (H / K)), *v = k + K * D, *bias = nullptr;
  float dq[OWN][PER], base[OWN], mean[OWN];
  clear(dq);
#if BUCKETS
  __shared__ Biases biases;
  __shared__ float sums[THREADS / 32 * DISTANCES];
  biases.load(rel, H, h);
  bias = biases.bias;
  BiasSums bias_sums(sums);
#endif
  load_tile(q_tile, qkv + view.q_start(b, h), view.q_stride(), row0, T);
  load_tile(dy_tile, dy + start_y, row_y, row0, T);
#pragma unroll
  for (int r = 0; r < OWN; r++) {
    const int row = min(own + r, T - 1);  // past the end there is nothing to write, only nothing to read
    const i64 at = start_y + row * row_y;
    float part = 0.0f;
    for (int d = lane; d < D; d += 32) part += dy[at + d] * y[at + d];
    mean[r] = warp_reduce(part, Sum());
    base[r] = lse[(i64)head * T + row];
    if (lane == 0 && own + r < T) stats[(i64)head * T + row] = {base[r], mean[r]};
  }
  const Range seen = view.keys_of_block(b, row0);
  for (int key0 = seen.low / ROWS * ROWS; key0 <= seen.high; key0 += ROWS) {
    __syncthreads();
    load_tile(k_tile, k, view.kv_stride(), key0, S);
    load_tile(v_tile, v, view.kv_stride(), key0, S);
    __syncthreads();
    const int key = key0 + lane;
    float s[OWN], ds[OWN];
    scores(s, q_tile + own_tile * LD, k_tile);
    scores(ds, dy_tile + own_tile * LD, v_tile);
#pragma unroll
    for (int r = 0; r < OWN; r++) {
      const Range keys = view.keys(b, own + r);
      bool sees = keys.low <= key && key <= keys.high && own + r < T;
      float prob = sees ? expf(scaled(s[r], scale, bias, key - own - r) - base[r]) : 0.0f;
      ds[r] = prob * (ds[r] * factor(rule, ((i64)head * T + own + r) * S + key) - mean[r]);
#if BUCKETS
      bias_sums.add(key - own - r, ds[r]);
#endif
    }
    pv_gemm(dq, ds, k_tile);
  }
#if BUCKETS
  bias_sums.store(parts + (i64)blockIdx.x * BUCKETS, sums, biases.bucket);
#endif
#pragma unroll
  for (int r = 0; r < OWN; r++) mean[r] = scale;
  store_rows(dqkv + view.q_start(b, h), view.q_stride(), own, T, dq, mean);
}

KERNEL __launch_bounds__(THREADS, 2) attention_backward_dkdv_simt_kernel(
    float *dqkv,               // (N, H + 2 K, D): the last 2 K
    float *dkv,                // (M, 2 K, D), with kv
    const Stat *stats,         // (B, H, T)
    const float *dy,           // (N, H D)
    const float *qkv,          // as dqkv; with kv (N, H, D)
    const float *kv,           // (M, 2 K, D)
    const float *rel,          // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  PLACE(K_, view.S);
  float *k_tile = shared, *v_tile = k_tile + ROWS * LD, *q_tile = v_tile + ROWS * LD, *dy_tile = q_tile + ROWS * LD;
  const int j = head % K, group = H / K;
  const i64 start = view.k_start(b, j);
  const float *k = (CROSS ? kv : qkv) + start, *bias = nullptr;
  float dk[OWN][PER], dv[OWN][PER];
  clear(dk);
  clear(dv);
  load_tile(k_tile, k, view.kv_stride(), row0, S);
  load_tile(v_tile, k + K * D, view.kv_stride(), row0, S);
  const Range seeing = view.queries_of_block(b, row0);
  for (int h = j * group; h < (j + 1) * group; h++) {
#if BUCKETS
    __shared__ Biases biases;
    __syncthreads();
    biases.load(rel, H, h);
    bias = biases.bias;
#endif
    for (int query0 = seeing.low / ROWS * ROWS; query0 <= seeing.high; query0 += ROWS) {
      __syncthreads();
      load_tile(q_tile, qkv + view.q_start(b, h), view.q_stride(), query0, T);
      load_tile(dy_tile, dy + ((i64)b * T * H + h) * D, (i64)H * D, query0, T);
      __syncthreads();
      const int query = query0 + lane;
      const Range keys = view.keys(b, query);
      const Stat stat = stats[((i64)b * H + h) * T + min(query, T - 1)];
      float s[OWN], ds[OWN];
      scores(s, k_tile + own_tile * LD, q_tile);
      scores(ds, v_tile + own_tile * LD, dy_tile);
#pragma unroll
      for (int r = 0; r < OWN; r++) {
        bool sees = query < T && keys.low <= own + r && own + r <= keys.high;
        float prob = sees ? expf(scaled(s[r], scale, bias, own + r - query) - stat.lse) : 0.0f;
        float kept = factor(rule, (((i64)b * H + h) * T + query) * S + own + r);
        ds[r] = prob * (ds[r] * kept - stat.delta);
        s[r] = prob * kept;
      }
      pv_gemm(dv, s, dy_tile);
      pv_gemm(dk, ds, q_tile);
    }
  }
  float scales[OWN];
#pragma unroll
  for (int r = 0; r < OWN; r++) scales[r] = scale;
  store_rows((CROSS ? dkv : dqkv) + start, view.kv_stride(), own, S, dk, scales);
#pragma unroll
  for (int r = 0; r < OWN; r++) scales[r] = 1.0f;
  store_rows((CROSS ? dkv : dqkv) + start + K * D, view.kv_stride(), own, S, dv, scales);
}
