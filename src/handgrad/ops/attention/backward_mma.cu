// attention_backward: dq, dk and dv from dy; probabilities are recomputed from lse               math: README.md §3, §7
// backward  writes =  dqkv: (N, (H + 2 K) D) bf16, or dqkv and dkv, in two launches: dq, statistics of the rows and
//           sums for drel, then dk and dv; in three for D > 128: dk, dv
// numerics  f32 softmax and sums; probabilities and their gradients are rounded to bf16 for the matmuls with q, k and
//           dy; exponentials in base 2 to 2 ULP (ex2.approx), an error that this rounding hides
// layout    dq: a warp owns 32 queries and streams keys and values. dk, dv: it owns 32 keys and streams queries and dy
//           of all query heads that read them, with scores transposed. Wide heads, dropout: 16. Scores stay in
//           registers
// determinism  fixed order, no atomics: always the same bits
// speed     not measured yet
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 2, in two passes
#include "mma.cuh"

// Steps of the A operands that stay in registers, and columns of scores at a time: as many as 255 registers hold
// without spills.
#define LARGE (TALL * DP > 96)
#define HELD_Q (WIDE ? 0 : STEPS)
#define HELD_DY (DP > 96 ? 0 : LARGE ? STEPS / 2 - 1 : STEPS)
#define HELD_K (WIDE ? 0 : DP > 96 ? STEPS / 2 : STEPS)
#define HELD_V (WIDE ? 0 : DP > 96 ? STEPS / 2 : LARGE ? STEPS - 2 : STEPS)
#define SPAN_DQ (WIDE ? 16 : 32)
#define SPAN_DKDV 16
enum { DK = 1, DV = 2 };  // what the second kernel computes (OUTPUTS): wide heads leave registers for one of them

struct alignas(8) Stat { float lse, delta; };  // of a query row: lse in base 2, rowsum of dy y

// base, delta: lse in base 2 and rowsum of dy y of a lane's rows; the warp also stores those of all its rows. dy, y,
// lse, stats: from the warp's first row on; `rows` exist.
__device__ __forceinline__ void row_statistics(float (&base)[TALL][2], float (&delta)[TALL][2], Stat *stats,
                                               const bf16 *dy, const bf16 *y, const float *lse, int rows) {
  const int lane = threadIdx.x % 32, mine = lane % OWN * LD;
  Stat stat = {0.0f, 0.0f};  // of row `lane`
#pragma unroll
  for (int c = 0; c < DP; c += 8) {
    Pack<bf16, 8> a = load<bf16, 8>(dy + mine + c), x = load<bf16, 8>(y + mine + c);
#pragma unroll
    for (int e = 0; e < 8; e++) stat.delta += a.at(e) * x.at(e);
  }
  if (lane < OWN && lane < rows) stat.lse = lse[lane] * LOG2E;
  if (lane < OWN) stats[lane] = stat;
#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) {
    base[i / 2][i % 2] = __shfl_sync(FULL, stat.lse, i * 8 + lane / 4);
    delta[i / 2][i % 2] = __shfl_sync(FULL, stat.delta, i * 8 + lane / 4);
  }
}

// ds = the gradients of the scores s, from dy v' in ds. element: the index of the tile's first.
template <int N>
__device__ __forceinline__ void score_gradients(const float (&s)[TALL][N][4], float (&ds)[TALL][N][4],
                                                const float (&base)[TALL][2], const float (&delta)[TALL][2],
                                                float scale2, const DropoutRule &rule, i64 element, i64 S) {
#pragma unroll
  for (int m = 0; m < TALL; m++)
#pragma unroll
    for (int n = 0; n < N; n++) {
      u32 bits = 15;
      if constexpr (DROPOUT) bits = kept(rule, element + m * 16 * S + n * 8, S);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float prob = exp2_fast(s[m][n][e] * scale2 - base[m][e / 2]);
        float dprob = DROPOUT ? (bits >> e & 1 ? ds[m][n][e] * rule.scale : 0.0f) : ds[m][n][e];
        ds[m][n][e] = prob * (dprob - delta[m][e / 2]);
      }
    }
}

// The same with rows of keys: s becomes the probabilities that are kept, too. stat: of the lane's queries.
template <int N>
__device__ __forceinline__ void key_gradients(float (&s)[TALL][N][4], float (&ds)[TALL][N][4], const Stat *stat,
                                              float scale2, const DropoutRule &rule, i64 element, i64 S) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    Pack<float, 4> row = load<float, 4>((const float *)(stat + n * 8));  // lse, delta of two queries
#pragma unroll
    for (int m = 0; m < TALL; m++) {
      u32 bits = 15;
      if constexpr (DROPOUT) bits = kept_transposed(rule, element + n * 8 * S + m * 16, S);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float prob = exp2_fast(s[m][n][e] * scale2 - row.v[e % 2 * 2]);
        if constexpr (OUTPUTS & DK) {
          float dprob = DROPOUT ? (bits >> e & 1 ? ds[m][n][e] * rule.scale : 0.0f) : ds[m][n][e];
          ds[m][n][e] = prob * (dprob - row.v[e % 2 * 2 + 1]);
        }
        s[m][n][e] = bits >> e & 1 ? prob : 0.0f;
      }
    }
  }
}

// Scores become -inf where the query, a column, does not see the key, a row. query, key: the lane's first.
template <int N>
__device__ __forceinline__ void query_mask(float (&s)[TALL][N][4], const View &view, const Range *stage, int query,
                                           int key) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Range keys = BOUNDS ? stage[threadIdx.x % 4 * 2 + n * 8 + i] : view.keys(0, query + n * 8 + i);
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int at = key + m * 16 + half * 8;
          if (at < keys.low || at > keys.high) s[m][n][half * 2 + i] = -HG_INF;
        }
    }
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dq_mma_kernel(
    bf16 *dqkv,                // (N, H + 2 K, D): the first H; with kv (N, H, D)
    Stat *stats,               // (B, H, T up to whole blocks)
    float *parts,              // (B, H, blocks, R): sums for drel
    const bf16 *dy,            // (N, H D)
    const bf16 *qkv,           // as dqkv
    const bf16 *kv,            // (M, 2 K, D)
    const bf16 *rel,           // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const bf16 *y,             // (N, H D)
    const float *lse,          // (B, H, T)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  HG_SHARED(bf16, q_tile);  // q, dy (ROWS, LD), then twice k, v (TILE, LD); y starts in the second of these
  bf16 *dy_tile = q_tile + ROWS * LD, *stages = dy_tile + ROWS * LD, *y_tile = stages + 2 * TILE * LD;
  const View view(T_, S_, H_, K_, first_key, last_key);
  const int T = view.T, S = view.S, H = view.H, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4, blocks = (T + ROWS - 1) / ROWS;
  Place at = place(blocks, (int)(N / T * H));
  const int row0 = (blocks - 1 - at.tile) * ROWS, own = row0 + warp * OWN, h = at.head % H, b = at.head / H;
  const i64 start_y = ((i64)b * T * H + h) * D, row_y = (i64)H * D, stride = view.kv_stride();
  const bf16 *k = (CROSS ? kv : qkv) + view.k_start(b, h / (H / view.K)), *v = k + view.K * D;
  const Range seen = view.keys_of_block(b, row0);
  const int first = seen.low / TILE, tiles = (seen.high + TILE) / TILE;
  const float scale2 = (BUCKETS ? 1.0f : scale) * LOG2E;
  DropoutRule rule(scalars, p, stream);

  load_tile<ROWS>(q_tile, qkv + view.q_start(b, h), view.q_stride(), row0, T);
  load_tile<ROWS>(dy_tile, dy + start_y, row_y, row0, T);
  load_tile<ROWS>(y_tile, y + start_y, row_y, row0, T);
  load_tile<TILE>(stages, k, stride, first * TILE, S);
  load_tile<TILE>(stages + TILE * LD, v, stride, first * TILE, S);
  copy_async_commit();
#if BUCKETS
  __shared__ Biases biases;
  __shared__ float sums[WARPS * DISTANCES], diagonals[WARPS][16 * (SPAN_DQ + 1)];
  biases.load(rel, H, h);
  BiasSums bias_sums(sums);
#endif
  Range keys[TALL][2];
  if constexpr (RANGES) load_ranges(keys, view, b, own + g);
  copy_async_wait<0>();
  __syncthreads();
  float base[TALL][2], delta[TALL][2];
  row_statistics(base, delta, stats + ((i64)at.head * blocks * ROWS + own), dy_tile + warp * OWN * LD,
                 y_tile + warp * OWN * LD, lse + ((i64)at.head * T + own), T - own);
  OperandA<TALL, HELD_Q> q_operand(q_tile + warp * OWN * LD);
  OperandA<TALL, HELD_DY> dy_operand(dy_tile + warp * OWN * LD);
  float dq[TALL][DP / 8][4];
  clear(dq);

  for (int j = first; j < tiles; j++) {
    const bf16 *k_tile = stages + (j - first) % 2 * 2 * TILE * LD, *v_tile = k_tile + TILE * LD;
    copy_async_wait<0>();
    __syncthreads();
    if (j + 1 < tiles) {
      bf16 *next = stages + (j + 1 - first) % 2 * 2 * TILE * LD;
      load_tile<TILE>(next, k, stride, (j + 1) * TILE, S);
      load_tile<TILE>(next + TILE * LD, v, stride, (j + 1) * TILE, S);
      copy_async_commit();
    }
#pragma unroll 1
    for (int part = 0; part < TILE; part += SPAN_DQ) {
      const int key0 = j * TILE + part;
      if (CAUSAL && key0 > own + OWN - 1) break;
      if (WINDOW && key0 + SPAN_DQ - 1 <= own - WINDOW) continue;
      float s[TALL][SPAN_DQ / 8][4], ds[TALL][SPAN_DQ / 8][4];
      scores(s, q_operand, k_tile + part * LD);
      scores(ds, dy_operand, v_tile + part * LD);
#if BUCKETS
      add_bias<false>(s, biases.bias, scale, key0 + t * 2 - own - g);
#endif
      if constexpr (RANGES) range_mask(s, keys, key0 + t * 2);
      else if (CAUSAL ? key0 + SPAN_DQ - 1 > own : key0 + SPAN_DQ > S)
        causal_mask<CAUSAL>(s, key0 + t * 2 - (CAUSAL ? own + g : S - 1));
      score_gradients(s, ds, base, delta, scale2, rule, ((i64)at.head * T + own) * S + key0, S);
#if BUCKETS
      add_diagonals(bias_sums, ds, diagonals[warp], key0 - own);
#endif
      scores_gemm(dq, ds, k_tile + part * LD);
    }
  }
#if BUCKETS
  bias_sums.store(parts + ((i64)at.head * blocks + at.tile) * BUCKETS, sums, biases.bucket);
#endif
  store_rows(dqkv + view.q_start(b, h), view.q_stride(), own, T, q_tile + warp * OWN * LD, dq, scale);
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dkdv_mma_kernel(
    bf16 *dqkv,                // (N, H + 2 K, D): the last 2 K
    bf16 *dkv,                 // (M, 2 K, D), with kv
    const Stat *stats,         // (B, H, T up to whole blocks)
    const bf16 *dy,            // (N, H D)
    const bf16 *qkv,           // as dqkv; with kv (N, H, D)
    const bf16 *kv,            // (M, 2 K, D)
    const bf16 *rel,           // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  HG_SHARED(bf16, k_tile);  // k, v (ROWS, LD), then twice q, dy (TILE, LD), statistics (TILE), then ranges (TILE)
  bf16 *v_tile = k_tile + ROWS * LD, *stages = v_tile + ROWS * LD;
  Stat *stat_stages = (Stat *)(stages + 4 * TILE * LD);
  Range *range_stages = (Range *)(stat_stages + 2 * TILE);
  const View view(T_, S_, H_, K_, first_key, last_key);
  const int T = view.T, S = view.S, H = view.H, K = view.K, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4, group = H / K;
  Place at = place((S + ROWS - 1) / ROWS, (int)(N / T * K));
  const int row0 = at.tile * ROWS, own = row0 + warp * OWN, b = at.head / K, kv_head = at.head % K;
  const int head0 = kv_head * group, padded = (T + ROWS - 1) / ROWS * ROWS;
  const i64 start = view.k_start(b, kv_head);
  const bf16 *k = (CROSS ? kv : qkv) + start, *q = qkv + view.q_start(b, head0);
  const bf16 *dy0 = dy + ((i64)b * T * H + head0) * D;
  const Range seeing = view.queries_of_block(b, row0);
  const int first = seeing.low / TILE, tiles = (seeing.high + TILE) / TILE - first;
  const float scale2 = (BUCKETS ? 1.0f : scale) * LOG2E;
  DropoutRule rule(scalars, p, stream);

  auto fetch = [&](int stage, int head, int tile) {
    bf16 *to = stages + stage * 2 * TILE * LD;
    load_tile<TILE>(to, q + head * D, view.q_stride(), tile * TILE, T);
    load_tile<TILE>(to + TILE * LD, dy0 + head * D, (i64)H * D, tile * TILE, T);
    const int i = threadIdx.x, row = (b * H + head0 + head) * padded + tile * TILE;
    if (i < TILE / 2) copy_async(stat_stages + stage * TILE + 2 * i, stats + row + 2 * i);
    if (BOUNDS && i < TILE) range_stages[stage * TILE + i] = view.keys(b, tile * TILE + i);
    copy_async_commit();
  };
  load_tile<ROWS>(k_tile, k, view.kv_stride(), row0, S);
  load_tile<ROWS>(v_tile, k + K * D, view.kv_stride(), row0, S);
  if (tiles > 0) fetch(0, 0, first);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const OperandA<TALL, HELD_K> k_operand(k_tile + warp * OWN * LD);
  const OperandA<TALL, HELD_V> v_operand(v_tile + warp * OWN * LD);
  float dk[TALL][DP / 8][4], dv[TALL][DP / 8][4];
  clear(dk);
  clear(dv);

  int head = 0, tile = first;
  for (int j = 0; j < group * tiles; j++) {
    const int here = tile * TILE;
    const bf16 *q_tile = stages + j % 2 * 2 * TILE * LD, *dy_tile = q_tile + TILE * LD;
    const Stat *stat = stat_stages + j % 2 * TILE + t * 2;
    const i64 element = (((i64)b * H + head0 + head) * T + here) * S + own;
    copy_async_wait<0>();
    __syncthreads();
#if BUCKETS
    __shared__ Biases biases;
    if (tile == first) biases.load(rel, H, head0 + head);
    __syncthreads();
#endif
    if (++tile == first + tiles) tile = first, head++;
    if (head < group) fetch((j + 1) % 2, head, tile);
#pragma unroll 1
    for (int part = 0; part < TILE; part += SPAN_DKDV) {
      const int query0 = here + part;
      if (CAUSAL && query0 + SPAN_DKDV - 1 < own) continue;  // no query sees a key of this warp
      if (WINDOW && query0 - WINDOW >= own + OWN - 1) break;
      float s[TALL][SPAN_DKDV / 8][4], ds[TALL][SPAN_DKDV / 8][4];
      scores(s, k_operand, q_tile + part * LD);
      if constexpr (OUTPUTS & DK) scores(ds, v_operand, dy_tile + part * LD);
#if BUCKETS
      add_bias<true>(s, biases.bias, scale, query0 + t * 2 - own - g);
#endif
      if constexpr (RANGES) query_mask(s, view, range_stages + j % 2 * TILE + part, query0 + t * 2, own + g);
      else if (CAUSAL && query0 < own + OWN - 1) causal_mask<true, true>(s, own + g - query0 - t * 2);
      key_gradients(s, ds, stat + part, scale2, rule, element + (i64)part * S, S);
      if constexpr (OUTPUTS & DV) scores_gemm(dv, s, dy_tile + part * LD);
      if constexpr (OUTPUTS & DK) scores_gemm(dk, ds, q_tile + part * LD);
    }
  }
  bf16 *to = (CROSS ? dkv : dqkv) + start;
  if constexpr (OUTPUTS & DK) store_rows(to, view.kv_stride(), own, S, k_tile + warp * OWN * LD, dk, scale);
  if constexpr (OUTPUTS & DV)
    store_rows(to + K * D, view.kv_stride(), own, S, v_tile + warp * OWN * LD, dv, rule.scale);
}
