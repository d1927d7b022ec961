// attention_backward: dq, dk and dv from dy; probabilities are recomputed from lse               math: README.md §3, §7
// backward  writes =  dqkv: (N, (H + 2 K) D) bf16, in two launches: dq and statistics of the rows, then dk and dv
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
#define HELD_DY (DP > 96 ? 0 : LARGE ? STEPS / 2 : STEPS)
#define HELD_K (DP > 96 ? STEPS / 2 : STEPS)
#define HELD_V (DP > 96 ? STEPS / 2 : LARGE ? STEPS - 1 : STEPS)
#define SPAN_DQ 32
#define SPAN_DKDV 16

struct alignas(8) Stat { float lse, delta; };  // of a query row: lse in base 2, rowsum of dy y

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dq_mma_kernel(
    bf16 *dqkv,         // (N, H + 2 K, D): the first H
    Stat *stats,        // (B, H, T up to whole blocks)
    const bf16 *dy,     // (N, H D)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const bf16 *y,      // (N, H D)
    const float *lse,   // (B, H, T)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  HG_SHARED(bf16, q_tile);  // q, dy (ROWS, LD), then twice k, v (TILE, LD); y starts in the second of these
  bf16 *dy_tile = q_tile + ROWS * LD, *stages = dy_tile + ROWS * LD, *y_tile = stages + 2 * TILE * LD;
  const int T = (int)T_, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const i64 stride = (H + 2 * K) * D;
  const int blocks = (T + ROWS - 1) / ROWS;
  Place at = place(blocks, (int)(N / T * H));
  const int row0 = (blocks - 1 - at.tile) * ROWS, own = row0 + warp * OWN, h = at.head % (int)H;
  const i64 start = at.head / (int)H * T * stride + h * D, start_y = (at.head / (int)H * T * H + h) * D;
  const bf16 *k = qkv + start + (H - h + h / (H / K)) * D, *v = k + K * D;
  const int tiles = ((CAUSAL ? min(T, row0 + ROWS) : T) + TILE - 1) / TILE;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  DropoutRule rule(scalars, p, stream);

  load_tile<ROWS>(q_tile, qkv + start, stride, row0, T);
  load_tile<ROWS>(dy_tile, dy + start_y, H * D, row0, T);
  load_tile<ROWS>(y_tile, y + start_y, H * D, row0, T);
  load_tile<TILE>(stages, k, stride, 0, T);
  load_tile<TILE>(stages + TILE * LD, v, stride, 0, T);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  Stat stat = {0.0f, 0.0f};  // of row own + lane
  const int mine = (warp * OWN + lane % OWN) * LD;
#pragma unroll
  for (int c = 0; c < DP; c += 8) {
    Pack<bf16, 8> a = load<bf16, 8>(dy_tile + mine + c), b = load<bf16, 8>(y_tile + mine + c);
#pragma unroll
    for (int e = 0; e < 8; e++) stat.delta += a.at(e) * b.at(e);
  }
  if (lane < OWN && own + lane < T) stat.lse = lse[(i64)at.head * T + own + lane] * LOG2E;
  if (lane < OWN) stats[(i64)at.head * blocks * ROWS + own + lane] = stat;
  float base[TALL][2], delta[TALL][2];
#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) {
    base[i / 2][i % 2] = __shfl_sync(FULL, stat.lse, i * 8 + g);
    delta[i / 2][i % 2] = __shfl_sync(FULL, stat.delta, i * 8 + g);
  }
  OperandA<TALL, STEPS> q_operand(q_tile + warp * OWN * LD);
  OperandA<TALL, HELD_DY> dy_operand(dy_tile + warp * OWN * LD);
  float dq[TALL][DP / 8][4];
  clear(dq);

  for (int j = 0; j < tiles; j++) {
    const bf16 *k_tile = stages + j % 2 * 2 * TILE * LD, *v_tile = k_tile + TILE * LD;
    copy_async_wait<0>();
    __syncthreads();
    if (j + 1 < tiles) {
      bf16 *next = stages + (j + 1) % 2 * 2 * TILE * LD;
      load_tile<TILE>(next, k, stride, (j + 1) * TILE, T);
      load_tile<TILE>(next + TILE * LD, v, stride, (j + 1) * TILE, T);
      copy_async_commit();
    }
#pragma unroll 1
    for (int part = 0; part < TILE; part += SPAN_DQ) {
      const int key0 = j * TILE + part;
      if (CAUSAL && key0 > own + OWN - 1) break;
      float s[TALL][SPAN_DQ / 8][4], ds[TALL][SPAN_DQ / 8][4];
      scores(s, q_operand, k_tile + part * LD);
      scores(ds, dy_operand, v_tile + part * LD);
      if (CAUSAL ? key0 + SPAN_DQ - 1 > own : key0 + SPAN_DQ > T)
        causal_mask<CAUSAL>(s, key0 + t * 2 - (CAUSAL ? own + g : T - 1));
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int n = 0; n < SPAN_DQ / 8; n++) {
          u32 bits = 15;
          if constexpr (DROPOUT) bits = kept(rule, ((i64)at.head * T + own + m * 16) * T + key0 + n * 8, T);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float prob = exp2_fast(s[m][n][e] * scale2 - base[m][e / 2]);
            float dprob = DROPOUT ? (bits >> e & 1 ? ds[m][n][e] * rule.scale : 0.0f) : ds[m][n][e];
            ds[m][n][e] = prob * (dprob - delta[m][e / 2]);
          }
        }
      u32 f[TALL][SPAN_DQ / 16][4];
      to_operand_a(f, ds);
      pv_gemm<TALL, SPAN_DQ / 8>(dq, f, k_tile + part * LD);
    }
  }
  store_rows(dqkv + start, stride, own, T, q_tile + warp * OWN * LD, dq, scale);
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dkdv_mma_kernel(
    bf16 *dqkv,         // (N, H + 2 K, D): the last 2 K
    const Stat *stats,  // (B, H, T up to whole blocks)
    const bf16 *dy,     // (N, H D)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  HG_SHARED(bf16, k_tile);  // k, v (ROWS, LD), then twice q, dy (TILE, LD), then twice their statistics (TILE)
  bf16 *v_tile = k_tile + ROWS * LD, *stages = v_tile + ROWS * LD;
  Stat *stat_stages = (Stat *)(stages + 4 * TILE * LD);
  const int T = (int)T_, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const i64 stride = (H + 2 * K) * D;
  Place at = place((T + ROWS - 1) / ROWS, (int)(N / T * K));
  const int row0 = at.tile * ROWS, own = row0 + warp * OWN, group = (int)(H / K), b = at.head / (int)K;
  const int head0 = at.head % (int)K * group;  // of the query heads that read this key/value head
  const i64 start = b * T * stride + (H + at.head % (int)K) * D;
  const bf16 *q = qkv + b * T * stride + head0 * D, *dy0 = dy + (b * T * H + head0) * D;
  const int padded = (T + ROWS - 1) / ROWS * ROWS;
  const int first = CAUSAL ? row0 / TILE : 0, tiles = (T + TILE - 1) / TILE - first;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  DropoutRule rule(scalars, p, stream);

  auto fetch = [&](int stage, int head, int tile) {
    bf16 *to = stages + stage * 2 * TILE * LD;
    load_tile<TILE>(to, q + head * D, stride, tile * TILE, T);
    load_tile<TILE>(to + TILE * LD, dy0 + head * D, H * D, tile * TILE, T);
    if (threadIdx.x < TILE / 2) {
      int i = threadIdx.x * 2, row = (b * (int)H + head0 + head) * padded + tile * TILE + i;
      copy_async(stat_stages + stage * TILE + i, stats + row);
    }
    copy_async_commit();
  };
  load_tile<ROWS>(k_tile, qkv + start, stride, row0, T);
  load_tile<ROWS>(v_tile, qkv + start + K * D, stride, row0, T);
  fetch(0, 0, first);
  copy_async_wait<0>();
  __syncthreads();
  const OperandA<TALL, HELD_K> k_operand(k_tile + warp * OWN * LD);
  const OperandA<TALL, HELD_V> v_operand(v_tile + warp * OWN * LD);
  float dk[TALL][DP / 8][4], dv[TALL][DP / 8][4];
  clear(dk);
  clear(dv);

  int head = 0, tile = first;
  for (int j = 0; j < group * tiles; j++) {
    const bf16 *q_tile = stages + j % 2 * 2 * TILE * LD, *dy_tile = q_tile + TILE * LD;
    const Stat *stat = stat_stages + j % 2 * TILE + t * 2;
    const int here = tile * TILE;
    const i64 head_row = ((i64)b * H + head0 + head) * T;
    copy_async_wait<0>();
    __syncthreads();
    if (++tile == first + tiles) tile = first, head++;
    if (head < group) fetch((j + 1) % 2, head, tile);
#pragma unroll 1
    for (int part = 0; part < TILE; part += SPAN_DKDV) {
      const int query0 = here + part;
      if (CAUSAL && query0 + SPAN_DKDV - 1 < own) continue;  // no query sees a key of this warp
      float s[TALL][SPAN_DKDV / 8][4], ds[TALL][SPAN_DKDV / 8][4];
      scores(s, k_operand, q_tile + part * LD);
      scores(ds, v_operand, dy_tile + part * LD);
      if (CAUSAL && query0 < own + OWN - 1) causal_mask<true, true>(s, own + g - query0 - t * 2);
#pragma unroll
      for (int n = 0; n < SPAN_DKDV / 8; n++) {
        Pack<float, 4> row = load<float, 4>((const float *)(stat + part + n * 8));  // lse, delta of two queries
#pragma unroll
        for (int m = 0; m < TALL; m++) {
          u32 bits = 15;
          if constexpr (DROPOUT) bits = kept_transposed(rule, (head_row + query0 + n * 8) * T + own + m * 16, T);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float prob = exp2_fast(s[m][n][e] * scale2 - row.v[e % 2 * 2]);
            float dprob = DROPOUT ? (bits >> e & 1 ? ds[m][n][e] * rule.scale : 0.0f) : ds[m][n][e];
            ds[m][n][e] = prob * (dprob - row.v[e % 2 * 2 + 1]);
            s[m][n][e] = bits >> e & 1 ? prob : 0.0f;
          }
        }
      }
      u32 f[TALL][SPAN_DKDV / 16][4];
      to_operand_a(f, s);
      pv_gemm<TALL, SPAN_DKDV / 8>(dv, f, dy_tile + part * LD);
      to_operand_a(f, ds);
      pv_gemm<TALL, SPAN_DKDV / 8>(dk, f, q_tile + part * LD);
    }
  }
  store_rows(dqkv + start, stride, own, T, k_tile + warp * OWN * LD, dk, scale);
  store_rows(dqkv + start + K * D, stride, own, T, v_tile + warp * OWN * LD, dv, rule.scale);
}
