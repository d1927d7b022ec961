// attention: y = softmax(scale q k', causal or not) v, on Hopper (sm_90a)                         math: README.md §2, §7
// forward   writes =  y: (N, H D) bf16;  lse: (B, H, T) f32
// needs     D = 64, T % 128 == 0, no dropout, no window, no optional input
// numerics  f32 softmax and sums; probabilities are rounded to bf16 for the matmul with v; exponentials in base 2 to 2
//           ULP (ex2.approx), an error that this rounding hides
// layout    a warpgroup owns 64 queries, in registers, and streams 128 keys and values at a time, as two tiles. While
//           it turns their scores into probabilities, the tensor cores multiply the previous probabilities and values
// determinism  fixed order, no atomics
// speed     H100 80GB, B=64 T=1024 H=12 causal, 2026-11-25: 0.325 ms, 317 TFLOP/s; cuDNN 9.20 in the same run 0.295 to
//           0.298 ms
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 1; Shah et al. 2024 (FlashAttention-3)
#include "wgmma.cuh"

enum {
  STAGE_BYTES = 4 * TILE_BYTES,  // two tiles of k, two of v
  STAGES_AT = WARPGROUPS * TILE_BYTES,  // after q
  OUT_AT = STAGES_AT + STAGES * STAGE_BYTES,
  BARRIERS_AT = OUT_AT + WARPGROUPS * TILE_BYTES
};
static_assert(BARRIERS_AT + 16 * (STAGES + 1) + 1024 <= SHARED_BYTES, "shared memory holds all tiles");

struct Sizes { int T, H, K, levels, heads; };

// The thread that loads: q of every row block, then its keys and values.
__device__ __forceinline__ void load_row_blocks(Shared &shared, const TensorMap *qkv, const Sizes &n) {
  RowBlock at;
  for (int round = 0; row_block(at, round, n.levels, n.heads); round++) {
    int row = (n.levels - 1 - at.level) * ROWS, first = at.head / n.H * n.T;
    int h = at.head % n.H, k = n.H + h / (n.H / n.K);
    u64 *full = shared.own.fill(WARPGROUPS * TILE_BYTES);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++)
      tma_load(shared.base + g * TILE_BYTES, qkv, h * D, first + row + g * TILE, full);
    shared.own.next();
    for (int j = 0; j < (CAUSAL ? row + ROWS : n.T); j += 2 * TILE, shared.ring.next()) {
      full = shared.ring.fill(STAGE_BYTES);
      char *to = shared.base + STAGES_AT + shared.ring.stage * STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        tma_load(to + i * TILE_BYTES, qkv, k * D, first + j + i * TILE, full);
        tma_load(to + (2 + i) * TILE_BYTES, qkv, (k + n.K) * D, first + j + i * TILE, full);
      }
    }
  }
}

// The largest score of each of a thread's two rows (g and g + 8), over two tiles.
__device__ __forceinline__ void row_maxima(float (&highest)[2], const float (&s)[2][SUMS]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float x[4] = {-HG_INF, -HG_INF, -HG_INF, -HG_INF};  // four short dependency chains instead of a long one
#pragma unroll
    for (int i = 2 * r; i < SUMS; i += 4) {
#pragma unroll
      for (int e = 0; e < 4; e++) x[e] = fmaxf(x[e], s[e / 2][i + e % 2]);
    }
    highest[r] = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
  }
}

// Online softmax of a thread's two rows.
struct Softmax {
  float top[2] = {-HG_INF, -HG_INF}, sum[2] = {0.0f, 0.0f}, shrink[2];
  bool grows = false;  // whether the last tiles moved a maximum of this warp: earlier outputs must then be shrunk

  // Scores of two tiles become e^(score - maximum), not yet divided by their sum. The maximum moves only if it grows by
  // more than 8 in base 2: a factor of 2^8 does no harm, and outputs are rarely rescaled.
  __device__ __forceinline__ void exponentiate(float (&s)[2][SUMS], float scale2) {
    float highest[2];
    row_maxima(highest, s);
    bool mine = highest[0] * scale2 > top[0] * scale2 + 8.0f || highest[1] * scale2 > top[1] * scale2 + 8.0f;
    grows = __any_sync(0xffffffffu, mine);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float higher = grows ? fmaxf(top[r], highest[r]) : top[r];
      shrink[r] = grows ? exp2_fast((top[r] - higher) * scale2) : 1.0f;
      top[r] = higher;
      sum[r] *= shrink[r];
    }
    float base[2] = {top[0] * scale2, top[1] * scale2};
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) {
        s[t][i] = exp2_fast(s[t][i] * scale2 - base[i % 4 / 2]);
        sum[i % 4 / 2] += s[t][i];
      }
  }
};

// The last two tiles of a row block lie on its diagonal: the first warpgroup sees half of the first one and nothing of
// the second, the other warpgroup all of the first and half of the second.
__device__ __forceinline__ void mask_diagonal(float (&s)[2][SUMS], int group) {
  if (group == 0) {
    causal_mask<false>(s[0]);
#pragma unroll
    for (int i = 0; i < SUMS; i++) s[1][i] = -HG_INF;
  } else {
    causal_mask<false>(s[1]);
  }
}

// Issues the scores of both key tiles at `stage`.
__device__ __forceinline__ void issue_scores(float (&s)[2][SUMS], const u32 (&q)[STEPS][4], u64 stage) {
  wgmma_fence();
  scores(s[0], q, stage);
  scores(s[1], q, stage + (TILE_BYTES >> 4));
  wgmma_commit();
}
// Issues o += p v for both value tiles at `stage`.
__device__ __forceinline__ void issue_outputs(float (&o)[SUMS], const u32 (&p)[2][STEPS][4], u64 stage) {
  pv_gemm(o, p[0], stage + (2 * TILE_BYTES >> 4));
  pv_gemm(o, p[1], stage + (3 * TILE_BYTES >> 4));
  wgmma_commit();
}

// o (not yet divided by the sums) and the softmax of a warpgroup's 64 queries, over `turns` pairs of tiles.
__device__ __forceinline__ void attend(float (&o)[SUMS], Softmax &softmax, Shared &shared, const u32 (&q)[STEPS][4],
                                       int turns, int group, u64 stages, float scale2) {
  Ring<STAGES> &ring = shared.ring;
  float s[2][SUMS];
  u32 p[2][STEPS][4];
  int here = ring.stage;
  ring.wait();
  ping_pong_wait(group);
  issue_scores(s, q, stages + ring.stage * (STAGE_BYTES >> 4));
  ping_pong_arrive(group);
  wgmma_wait<0>();
  wgmma_settle(s[0]);
  wgmma_settle(s[1]);
  if (CAUSAL && turns == 1) mask_diagonal(s, group);
  softmax.exponentiate(s, scale2);
  to_operand_a(p[0], s[0]);
  to_operand_a(p[1], s[1]);
  clear(o);
  for (int j = 1; j < turns; j++) {
    ring.next();
    ring.wait();
    ping_pong_wait(group);
    issue_scores(s, q, stages + ring.stage * (STAGE_BYTES >> 4));
    issue_outputs(o, p, stages + here * (STAGE_BYTES >> 4));
    ping_pong_arrive(group);
    wgmma_wait<1>();
    wgmma_settle(s[0]);
    wgmma_settle(s[1]);
    if (CAUSAL && j + 1 == turns) mask_diagonal(s, group);
    softmax.exponentiate(s, scale2);
    wgmma_wait<0>();
    wgmma_settle(o);
    release(ring.empty + here);
    here = ring.stage;
    if (softmax.grows)
#pragma unroll
      for (int i = 0; i < SUMS; i++) o[i] *= softmax.shrink[i % 4 / 2];
    to_operand_a(p[0], s[0]);
    to_operand_a(p[1], s[1]);
  }
  ping_pong_wait(group);
  wgmma_fence();
  issue_outputs(o, p, stages + here * (STAGE_BYTES >> 4));
  ping_pong_arrive(group);
  wgmma_wait<0>();
  wgmma_settle(o);
  release(ring.empty + here);
  ring.next();
}

KERNEL __launch_bounds__(THREADS, 1) attention_forward_wgmma_kernel(
    const __grid_constant__ TensorMap y,    // (N, H D)
    const __grid_constant__ TensorMap qkv,  // (N, (H + 2 K) D)
    float *lse,                             // (B, H, T)
    i64 N, i64 T_, i64 H_, i64 K_, float scale) {
  HG_SHARED(char, raw);
  Shared shared(raw, BARRIERS_AT);
  const int T = (int)T_, H = (int)H_;
  const Sizes n = {T, H, (int)K_, T / ROWS, (int)(N / T) * H};
  shared.init();
  if (threadIdx.x >= 128 * WARPGROUPS) {  // this warpgroup only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x > 128 * WARPGROUPS) return;
    load_row_blocks(shared, &qkv, n);
    return;
  }
  setmaxnreg_inc<232>();
  const int group = warpgroup(), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  char *out = shared.base + OUT_AT + group * TILE_BYTES;
  const float scale2 = scale * LOG2E;
  const u64 stages = wgmma_operand(shared.base + STAGES_AT, TILE_BYTES);
  if (group) ping_pong_arrive(group);
  RowBlock at;
  for (int round = 0; row_block(at, round, n.levels, n.heads); round++) {
    const int row = (n.levels - 1 - at.level) * ROWS + group * TILE, h = at.head % H;
    u32 q[STEPS][4];
    shared.own.wait();
    load_operand_a(q, shared.base + group * TILE_BYTES);
    release(shared.own.empty);
    shared.own.next();
    float o[SUMS];
    Softmax softmax;
    attend(o, softmax, shared, q, CAUSAL ? row / ROWS + 1 : T / ROWS, group, stages, scale2);
    float (&sum)[2] = softmax.sum;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      const i64 query = (i64)at.head * T + row + warp * 16 + r * 8 + lane / 4;
      if (lane % 4 == 0) lse[query] = softmax.top[r] * scale + logf(sum[r]);
    }
    wait_stored();
    store_tile(&y, h * D, at.head / H * T + row, out, o, 1.0f / sum[0], 1.0f / sum[1]);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}
