// attention: dqkv from dy and what the forward saved, on Hopper (sm_90a)                         math: README.md §3, §7
// dq        writes =  dqkv: (N, (H + 2 K) D) bf16, its first H heads;  stats: lse and delta of every row, for dk, dv
// dkdv      writes =  dqkv: its other 2 K heads
// needs     D = 64, T % 128 == 0, no dropout, no window, no optional input
// numerics  scores and their gradients in f32, rounded to bf16 for the matmul that follows; sums in f32
// layout    dq: a warpgroup owns 64 queries; dk and dv: 64 keys, with scores transposed. A operands stay in registers,
//           so that a matmul reads only B from shared memory; scores never leave registers
// determinism  fixed order, no atomics: always the same bits
// speed     H100 80GB, B=64 T=1024 H=12 causal, 2026-11-25: both together 0.746 to 0.785 ms, 329 to 346 TFLOP/s of 5
//           matmuls; cuDNN 9.20 in the same run 1.13 to 1.19 ms
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 2, in two passes; Shah et al. 2024
//           (FlashAttention-3)
#include "wgmma.cuh"

struct alignas(8) Stat { float lse, delta; };  // of a query row: lse in base 2, rowsum of dy y

enum {
  STAGE_BYTES = 2 * TILE_BYTES,           // k and v, or q and dy
  OWN_BYTES = 3 * WARPGROUPS * TILE_BYTES,  // q, dy and y, or k and v, of the row block
  STAGES_AT = OWN_BYTES,
  OUT_AT = STAGES_AT + STAGES * STAGE_BYTES,
  STATS_AT = OUT_AT + 2 * WARPGROUPS * TILE_BYTES,  // TILE of them for each stage; dq: lse of the row block
  STAT_BYTES = TILE * (int)sizeof(Stat),
  BARRIERS_AT = STATS_AT + STAGES * STAT_BYTES
};
static_assert(BARRIERS_AT + 16 * (STAGES + 1) + 1024 <= SHARED_BYTES, "shared memory holds all tiles");

struct Sizes { int T, H, K, levels, heads; };

// Issues the scores of a tile and dy v', from which their gradients come, as two groups. a, b: A operands; at: of the B
// operands.
__device__ __forceinline__ void issue_scores(float (&s)[SUMS], float (&ds)[SUMS], const u32 (&a)[STEPS][4],
                                             const u32 (&b)[STEPS][4], u64 at) {
  wgmma_fence();
  scores(s, a, at);
  wgmma_commit();
  scores(ds, b, at + (TILE_BYTES >> 4));
  wgmma_commit();
}

// dq -----------------------------------------------------------------------------------------------------------------

// The thread that loads: q, dy, y and lse of every row block, then its keys and values.
__device__ __forceinline__ void load_query_blocks(Shared &shared, const TensorMap *dy, const TensorMap *qkv,
                                                  const TensorMap *y, const float *lse, const Sizes &n) {
  RowBlock at;
  for (int round = 0; row_block(at, round, n.levels, n.heads); round++) {
    int row = (n.levels - 1 - at.level) * ROWS, first = at.head / n.H * n.T;
    int h = at.head % n.H, k = n.H + h / (n.H / n.K);
    u64 *full = shared.own.fill(OWN_BYTES + ROWS * 4);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++) {
      tma_load(shared.base + g * TILE_BYTES, qkv, h * D, first + row + g * TILE, full);
      tma_load(shared.base + (WARPGROUPS + g) * TILE_BYTES, dy, h * D, first + row + g * TILE, full);
      tma_load(shared.base + (2 * WARPGROUPS + g) * TILE_BYTES, y, h * D, first + row + g * TILE, full);
    }
    tma_load_bytes(shared.base + STATS_AT, lse + (i64)at.head * n.T + row, ROWS * 4, full);
    shared.own.next();
    for (int j = 0; j < (CAUSAL ? row + ROWS : n.T); j += TILE, shared.ring.next()) {
      full = shared.ring.fill(STAGE_BYTES);
      char *to = shared.base + STAGES_AT + shared.ring.stage * STAGE_BYTES;
      tma_load(to, qkv, k * D, first + j, full);
      tma_load(to + TILE_BYTES, qkv, (k + n.K) * D, first + j, full);
    }
  }
}

// Row sums of dy y, of rows g and g + 8 of the warp.
__device__ __forceinline__ void row_deltas(float (&delta)[2], const u32 (&dy)[STEPS][4], const u32 (&y)[STEPS][4]) {
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 a = dy[k][i], b = y[k][i];
      delta[i % 2] += __uint_as_float(a << 16) * __uint_as_float(b << 16);
      delta[i % 2] += __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
    }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], 1);
    delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], 2);
  }
}

// dq of a warpgroup's 64 queries, over `tiles` tiles of keys and values. f: a buffer for A operands.
__device__ __forceinline__ void sum_dq(float (&dq)[SUMS], Shared &shared, const u32 (&q)[STEPS][4],
                                       const u32 (&dys)[STEPS][4], u32 (&f)[STEPS][4], const float (&base)[2],
                                       const float (&delta)[2], int tiles, int group, u64 stages, float scale2) {
  Ring<STAGES> &ring = shared.ring;
  float s[SUMS], ds[SUMS];
  clear(dq);
  int before = ring.stage;
  ring.wait();
  ping_pong_wait(group);
  issue_scores(s, ds, q, dys, stages + before * (STAGE_BYTES >> 4));
  wgmma_commit();
  ping_pong_arrive(group);
  for (int j = 1;; j++) {
    wgmma_wait<2>();
    wgmma_settle(s);
    if (CAUSAL && j == tiles) causal_mask<false>(s);
#pragma unroll
    for (int i = 0; i < SUMS; i++) s[i] = exp2_fast(s[i] * scale2 - base[i % 4 / 2]);
    wgmma_wait<1>();
    wgmma_settle(ds);
#pragma unroll
    for (int i = 0; i < SUMS; i++) ds[i] = s[i] * (ds[i] - delta[i % 4 / 2]);
    wgmma_wait<0>();
    wgmma_settle(dq);
    if (j > 1) release(ring.empty + before);
    before = ring.stage;
    to_operand_a(f, ds);
    if (j == tiles) break;
    ring.next();
    ring.wait();
    ping_pong_wait(group);
    issue_scores(s, ds, q, dys, stages + ring.stage * (STAGE_BYTES >> 4));
    pv_gemm(dq, f, stages + before * (STAGE_BYTES >> 4));
    wgmma_commit();
    ping_pong_arrive(group);
  }
  ping_pong_wait(group);
  wgmma_fence();
  pv_gemm(dq, f, stages + before * (STAGE_BYTES >> 4));
  wgmma_commit();
  ping_pong_arrive(group);
  wgmma_wait<0>();
  wgmma_settle(dq);
  release(ring.empty + before);
  ring.next();
}

KERNEL __launch_bounds__(THREADS, 1) attention_backward_dq_wgmma_kernel(
    const __grid_constant__ TensorMap dqkv,  // (N, (H + 2 K) D)
    const __grid_constant__ TensorMap dy,    // (N, H D)
    const __grid_constant__ TensorMap qkv,   // (N, (H + 2 K) D)
    const __grid_constant__ TensorMap y,     // (N, H D)
    Stat *stats,                             // (B, H, T)
    const float *lse,                        // (B, H, T)
    i64 N, i64 T_, i64 H_, i64 K_, float scale) {
  HG_SHARED(char, raw);
  Shared shared(raw, BARRIERS_AT);
  const int T = (int)T_, H = (int)H_;
  const Sizes n = {T, H, (int)K_, T / ROWS, (int)(N / T) * H};
  shared.init();
  if (threadIdx.x >= 128 * WARPGROUPS) {  // this warpgroup only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x > 128 * WARPGROUPS) return;
    load_query_blocks(shared, &dy, &qkv, &y, lse, n);
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
    u32 q[STEPS][4], dys[STEPS][4], f[STEPS][4];
    shared.own.wait();
    load_operand_a(q, shared.base + group * TILE_BYTES);
    load_operand_a(dys, shared.base + (WARPGROUPS + group) * TILE_BYTES);
    load_operand_a(f, shared.base + (2 * WARPGROUPS + group) * TILE_BYTES);  // y, until delta is known
    float base[2], delta[2] = {0.0f, 0.0f};  // of rows g and g + 8
    const float *lses = (const float *)(shared.base + STATS_AT);
#pragma unroll
    for (int i = 0; i < 2; i++) base[i] = lses[group * TILE + warp * 16 + i * 8 + lane / 4] * LOG2E;
    release(shared.own.empty);
    shared.own.next();
    row_deltas(delta, dys, f);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane % 4 == 0) stats[(i64)at.head * T + row + warp * 16 + i * 8 + lane / 4] = {base[i], delta[i]};

    const int tiles = CAUSAL ? row / TILE + 1 : T / TILE, loaded = CAUSAL ? (row - group * TILE + ROWS) / TILE : tiles;
    float dq[SUMS];
    sum_dq(dq, shared, q, dys, f, base, delta, tiles, group, stages, scale2);
    for (int j = tiles; j < loaded; j++, shared.ring.next()) {  // no row of this warpgroup sees the tile
      shared.ring.wait();
      release(shared.ring.empty + shared.ring.stage);
      ping_pong_wait(group);
      ping_pong_arrive(group);
    }
    wait_stored();
    store_tile(&dqkv, h * D, at.head / H * T + row, out, dq, scale, scale);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}

// dk, dv -------------------------------------------------------------------------------------------------------------

// The thread that loads: k and v of every row block, then q, dy and statistics of all queries that see it.
__device__ __forceinline__ void load_key_blocks(Shared &shared, const TensorMap *dy, const TensorMap *qkv,
                                                const Stat *stats, const Sizes &n) {
  const int T = n.T, H = n.H, K = n.K, share = H / K;
  RowBlock at;
  for (int round = 0; row_block(at, round, n.levels, n.heads); round++) {
    int row = at.level * ROWS, first = at.head / K * T, k = at.head % K;
    u64 *full = shared.own.fill(STAGE_BYTES * WARPGROUPS);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++) {
      tma_load(shared.base + g * TILE_BYTES, qkv, (H + k) * D, first + row + g * TILE, full);
      tma_load(shared.base + (WARPGROUPS + g) * TILE_BYTES, qkv, (H + K + k) * D, first + row + g * TILE, full);
    }
    shared.own.next();
    for (int h = k * share; h < (k + 1) * share; h++)
      for (int j = CAUSAL ? row : 0; j < T; j += TILE, shared.ring.next()) {
        full = shared.ring.fill(STAGE_BYTES + STAT_BYTES);
        const int stage = shared.ring.stage;
        char *to = shared.base + STAGES_AT + stage * STAGE_BYTES;
        tma_load(to, qkv, h * D, first + j, full);
        tma_load(to + TILE_BYTES, dy, h * D, first + j, full);
        const Stat *from = stats + (i64)(at.head / K * H + h) * T + j;
        tma_load_bytes(shared.base + STATS_AT + stage * STAT_BYTES, from, STAT_BYTES, full);
      }
  }
}

// Transposed scores and dy v' become probabilities (s) and their gradients (ds). stat: of this lane's queries.
__device__ __forceinline__ void probabilities(float (&s)[SUMS], float (&ds)[SUMS], const float4 *stat, bool diagonal,
                                              float scale2) {
  wgmma_wait<2>();
  wgmma_settle(s);
  if (diagonal) causal_mask<true>(s);
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    float4 two = stat[i];  // lse, delta, lse, delta
#pragma unroll
    for (int e = 0; e < 4; e++) s[i + e] = exp2_fast(s[i + e] * scale2 - (e % 2 ? two.z : two.x));
  }
  wgmma_wait<1>();
  wgmma_settle(ds);
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    float4 two = stat[i];
#pragma unroll
    for (int e = 0; e < 4; e++) ds[i + e] = s[i + e] * (ds[i + e] - (e % 2 ? two.w : two.y));
  }
}

// No query of the tile sees a key of this warpgroup: it releases the stage and takes its turns.
__device__ __forceinline__ void skip_tile(Ring<STAGES> &ring, int group) {
  ring.wait();
  release(ring.empty + ring.stage);
  ring.next();
  ping_pong_wait(group);
  ping_pong_arrive(group);
}

// dk and dv of a warpgroup's 64 keys, over the query tiles first .. last of `share` heads.
__device__ __forceinline__ void sum_dkdv(float (&dk)[SUMS], float (&dv)[SUMS], Shared &shared,
                                         const u32 (&ks)[STEPS][4], const u32 (&vs)[STEPS][4], int first, int last,
                                         int share, int group, u64 stages, float scale2) {
  Ring<STAGES> &ring = shared.ring;
  float s[SUMS], ds[SUMS];
  u32 p[STEPS][4], f[STEPS][4];
  clear(dk);
  clear(dv);
  if (CAUSAL && group) skip_tile(ring, group);
  int before = ring.stage;
  ring.wait();
  ping_pong_wait(group);
  issue_scores(s, ds, ks, vs, stages + before * (STAGE_BYTES >> 4));
  wgmma_commit();
  ping_pong_arrive(group);
  for (int h = 0, j = first;;) {
    const char *stat = shared.base + STATS_AT + ring.stage * STAT_BYTES;
    probabilities(s, ds, (const float4 *)stat + threadIdx.x % 4, CAUSAL && j == first, scale2);
    wgmma_wait<0>();
    wgmma_settle(dk);
    wgmma_settle(dv);
    if (h > 0 || j > first) release(ring.empty + before);
    before = ring.stage;
    to_operand_a(p, s);
    to_operand_a(f, ds);
    ring.next();
    if (++j > last) {
      j = first;
      if (++h == share) break;
      if (CAUSAL && group) skip_tile(ring, group);
    }
    ring.wait();
    ping_pong_wait(group);
    issue_scores(s, ds, ks, vs, stages + ring.stage * (STAGE_BYTES >> 4));
    pv_gemm(dv, p, stages + before * (STAGE_BYTES >> 4) + (TILE_BYTES >> 4));
    pv_gemm(dk, f, stages + before * (STAGE_BYTES >> 4));
    wgmma_commit();
    ping_pong_arrive(group);
  }
  ping_pong_wait(group);
  wgmma_fence();
  pv_gemm(dv, p, stages + before * (STAGE_BYTES >> 4) + (TILE_BYTES >> 4));
  pv_gemm(dk, f, stages + before * (STAGE_BYTES >> 4));
  wgmma_commit();
  ping_pong_arrive(group);
  wgmma_wait<0>();
  wgmma_settle(dk);
  wgmma_settle(dv);
  release(ring.empty + before);
}

KERNEL __launch_bounds__(THREADS, 1) attention_backward_dkdv_wgmma_kernel(
    const __grid_constant__ TensorMap dqkv,  // (N, (H + 2 K) D)
    const __grid_constant__ TensorMap dy,    // (N, H D)
    const __grid_constant__ TensorMap qkv,   // (N, (H + 2 K) D)
    const Stat *stats,                       // (B, H, T)
    i64 N, i64 T_, i64 H_, i64 K_, float scale) {
  HG_SHARED(char, raw);
  Shared shared(raw, BARRIERS_AT);
  const int T = (int)T_, H = (int)H_, K = (int)K_;
  const Sizes n = {T, H, K, T / ROWS, (int)(N / T) * K};
  shared.init();
  if (threadIdx.x >= 128 * WARPGROUPS) {  // this warpgroup only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x > 128 * WARPGROUPS) return;
    load_key_blocks(shared, &dy, &qkv, stats, n);
    return;
  }
  setmaxnreg_inc<232>();
  const int group = warpgroup();
  char *out = shared.base + OUT_AT + 2 * group * TILE_BYTES;
  const float scale2 = scale * LOG2E;
  const u64 stages = wgmma_operand(shared.base + STAGES_AT, TILE_BYTES);
  if (group) ping_pong_arrive(group);
  RowBlock at;
  for (int round = 0; row_block(at, round, n.levels, n.heads); round++) {
    const int row = at.level * ROWS + group * TILE, k = at.head % K;
    u32 ks[STEPS][4], vs[STEPS][4];
    shared.own.wait();
    load_operand_a(ks, shared.base + group * TILE_BYTES);
    load_operand_a(vs, shared.base + (WARPGROUPS + group) * TILE_BYTES);
    release(shared.own.empty);
    shared.own.next();
    float dk[SUMS], dv[SUMS];
    sum_dkdv(dk, dv, shared, ks, vs, CAUSAL ? row / TILE : 0, T / TILE - 1, H / K, group, stages, scale2);
    wait_stored();
    store_tile(&dqkv, (H + k) * D, at.head / K * T + row, out, dk, scale, scale);
    store_tile(&dqkv, (H + K + k) * D, at.head / K * T + row, out + TILE_BYTES, dv, 1.0f, 1.0f);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}
