// attention backward, from dy and what the forward saved, on Hopper's tensor cores (sm_90a)     math: README.md §3, §7
// dq        writes =  dqkv: (N, (H + 2 K) D) bf16, its first H heads;  stats: lse and delta of every row, for dk, dv
// dkdv      writes =  dqkv: its other 2 K heads
// needs     D = 64, T % 128 == 0, no dropout
// numerics  scores and their gradients in f32, rounded to bf16 for the product that follows; sums in f32
// layout    dq: a warp group owns 64 queries, dk and dv: 64 keys, with scores transposed. Left factors stay in registers, so
//           that a product reads only its right one from shared memory; scores never leave registers
// determinism  fixed order, no atomics: always the same bits
// speed     H100 80GB, B=64 T=1024 H=12 causal, 2026-11-25: both together 0.746 to 0.785 ms, 329 to 346 TFLOP/s of 5 products;
//           cuDNN 9.20 in the same run 1.13 to 1.19 ms
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 2, cut in two; Shah et al. 2024 (FlashAttention-3)
#include "groups.cuh"

struct alignas(8) Stat { float lse, delta; };  // of a query row: lse in base 2, rowsum of dy y

enum {
  STAGES = 6,
  STAGE = 2 * BOX,                                    // k and v, or q and dy
  OWN = 3 * ROWS * D * 2,                             // q, dy and y, or k and v, of the rows that the block owns
  STAGES_AT = OWN, OUT_AT = STAGES_AT + STAGES * STAGE,
  STATS_AT = OUT_AT + 2 * GROUPS * BOX,               // a row of 64 for each stage; dq: lse of the block's rows
  BARRIERS_AT = STATS_AT + STAGES * TILE * 8
};

// Scores of a tile and what will be their gradients, as two groups of products. a, b: left factors; at: of the right ones.
__device__ __forceinline__ void start(float (&s)[SUMS], float (&ds)[SUMS], const u32 (&a)[STEPS][4], const u32 (&b)[STEPS][4], u64 at) {
  wgmma_fence();
  scores(s, a, at);
  wgmma_commit();
  scores(ds, b, at + (BOX >> 4));
  wgmma_commit();
}

KERNEL __launch_bounds__(THREADS, 1) attention_backward_dq_kernel(
    const __grid_constant__ TensorMap dqkv,
    const __grid_constant__ TensorMap dy,
    const __grid_constant__ TensorMap qkv,
    const __grid_constant__ TensorMap y,
    Stat *stats,        // (B, H, T)
    const float *lse,   // (B, H, T)
    i64 N, i64 T_, i64 H_, i64 K_) {
  HG_SHARED(char, raw);
  char *room = raw + (1024 - shared_address(raw) % 1024) % 1024;
  u64 *barriers = (u64 *)(room + BARRIERS_AT);
  Ring<STAGES> ring = {barriers, barriers + STAGES};
  Ring<1> own = {barriers + 2 * STAGES, barriers + 2 * STAGES + 1};
  const int T = (int)T_, H = (int)H_, K = (int)K_, levels = T / ROWS, heads = (int)(N / T) * H;
  if (threadIdx.x == 0) {
    ring.init();
    own.init();
    barrier_init_done();
  }
  __syncthreads();

  Place at;
  if (threadIdx.x >= 128 * GROUPS) {  // this warp group only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x > 128 * GROUPS) return;
    for (int round = 0; place(at, round, levels, heads); round++) {
      int row = (levels - 1 - at.level) * ROWS, first = at.head / H * T, h = at.head % H, k = H + h / (H / K);
      u64 *full = own.fill(OWN + ROWS * 4);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        tma_load(room + g * BOX, &qkv, h * D, first + row + g * TILE, full);
        tma_load(room + (GROUPS + g) * BOX, &dy, h * D, first + row + g * TILE, full);
        tma_load(room + (2 * GROUPS + g) * BOX, &y, h * D, first + row + g * TILE, full);
      }
      tma_load_bytes(room + STATS_AT, lse + (i64)at.head * T + row, ROWS * 4, full);
      own.next();
      for (int j = 0; j < (CAUSAL ? row + ROWS : T); j += TILE, ring.next()) {
        full = ring.fill(STAGE);
        char *to = room + STAGES_AT + ring.stage * STAGE;
        tma_load(to, &qkv, k * D, first + j, full);
        tma_load(to + BOX, &qkv, (k + K) * D, first + j, full);
      }
    }
    return;
  }
  setmaxnreg_inc<232>();
  const int group = warp_group(), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  char *out = room + OUT_AT + group * BOX;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  const u64 stages = wgmma_operand(room + STAGES_AT, BOX);
  if (group) pass_turn(group);
  for (int round = 0; place(at, round, levels, heads); round++) {
    const int row = (levels - 1 - at.level) * ROWS + group * TILE, h = at.head % H;
    u32 q[STEPS][4], dys[STEPS][4], f[STEPS][4];
    own.wait();
    load_left(q, room + group * BOX);
    load_left(dys, room + (GROUPS + group) * BOX);
    load_left(f, room + (2 * GROUPS + group) * BOX);
    float base[2], delta[2] = {0.0f, 0.0f};  // of rows g and g + 8
#pragma unroll
    for (int i = 0; i < 2; i++) base[i] = ((float *)(room + STATS_AT))[group * TILE + warp * 16 + i * 8 + lane / 4] * LOG2E;
    leave(own.empty);
    own.next();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 a = dys[k][i], b = f[k][i];
        delta[i % 2] += __uint_as_float(a << 16) * __uint_as_float(b << 16);
        delta[i % 2] += __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], 1);
      delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], 2);
      if (lane % 4 == 0) stats[(i64)at.head * T + row + warp * 16 + i * 8 + lane / 4] = {base[i], delta[i]};
    }

    const int tiles = CAUSAL ? row / TILE + 1 : T / TILE, loaded = CAUSAL ? (row - group * TILE + ROWS) / TILE : tiles;
    float dq[SUMS], s[SUMS], ds[SUMS];
    clear(dq);
    int before = ring.stage;
    ring.wait();
    take_turn(group);
    start(s, ds, q, dys, stages + before * (STAGE >> 4));
    wgmma_commit();
    pass_turn(group);
    for (int j = 1;; j++) {
      wgmma_wait<2>();
      wgmma_settle(s);
      if (CAUSAL && j == tiles) hide<false>(s);
#pragma unroll
      for (int i = 0; i < SUMS; i++) s[i] = exp2_fast(s[i] * scale2 - base[i % 4 / 2]);
      wgmma_wait<1>();
      wgmma_settle(ds);
#pragma unroll
      for (int i = 0; i < SUMS; i++) ds[i] = s[i] * (ds[i] - delta[i % 4 / 2]);
      wgmma_wait<0>();
      wgmma_settle(dq);
      if (j > 1) leave(ring.empty + before);
      before = ring.stage;
      factors(f, ds);
      if (j == tiles) break;
      ring.next();
      ring.wait();
      take_turn(group);
      start(s, ds, q, dys, stages + ring.stage * (STAGE >> 4));
      mix(dq, f, stages + before * (STAGE >> 4));
      wgmma_commit();
      pass_turn(group);
    }
    take_turn(group);
    wgmma_fence();
    mix(dq, f, stages + before * (STAGE >> 4));
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(dq);
    leave(ring.empty + before);
    ring.next();
    for (int j = tiles; j < loaded; j++, ring.next()) {  // no row of this warp group sees the tile
      ring.wait();
      leave(ring.empty + ring.stage);
      take_turn(group);
      pass_turn(group);
    }
    wait_stored();
    store_tile(&dqkv, h * D, at.head / H * T + row, out, dq, scale, scale);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}

KERNEL __launch_bounds__(THREADS, 1) attention_backward_dkdv_kernel(
    const __grid_constant__ TensorMap dqkv,
    const __grid_constant__ TensorMap dy,
    const __grid_constant__ TensorMap qkv,
    const Stat *stats,  // (B, H, T)
    i64 N, i64 T_, i64 H_, i64 K_) {
  HG_SHARED(char, raw);
  char *room = raw + (1024 - shared_address(raw) % 1024) % 1024;
  u64 *barriers = (u64 *)(room + BARRIERS_AT);
  Ring<STAGES> ring = {barriers, barriers + STAGES};
  Ring<1> own = {barriers + 2 * STAGES, barriers + 2 * STAGES + 1};
  const int T = (int)T_, H = (int)H_, K = (int)K_, levels = T / ROWS, heads = (int)(N / T) * K, share = H / K;
  if (threadIdx.x == 0) {
    ring.init();
    own.init();
    barrier_init_done();
  }
  __syncthreads();

  Place at;
  if (threadIdx.x >= 128 * GROUPS) {  // this warp group only loads
    setmaxnreg_dec<40>();
    if (threadIdx.x > 128 * GROUPS) return;
    for (int round = 0; place(at, round, levels, heads); round++) {
      int row = at.level * ROWS, first = at.head / K * T, k = at.head % K;
      u64 *full = own.fill(STAGE * GROUPS);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        tma_load(room + g * BOX, &qkv, (H + k) * D, first + row + g * TILE, full);
        tma_load(room + (GROUPS + g) * BOX, &qkv, (H + K + k) * D, first + row + g * TILE, full);
      }
      own.next();
      for (int h = k * share; h < (k + 1) * share; h++)
        for (int j = CAUSAL ? row : 0; j < T; j += TILE, ring.next()) {
          full = ring.fill(STAGE + TILE * 8);
          char *to = room + STAGES_AT + ring.stage * STAGE;
          tma_load(to, &qkv, h * D, first + j, full);
          tma_load(to + BOX, &dy, h * D, first + j, full);
          tma_load_bytes(room + STATS_AT + ring.stage * TILE * 8, stats + (i64)(at.head / K * H + h) * T + j, TILE * 8, full);
        }
    }
    return;
  }
  setmaxnreg_inc<232>();
  const int group = warp_group(), lane = threadIdx.x % 32;
  char *out = room + OUT_AT + 2 * group * BOX;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  const u64 stages = wgmma_operand(room + STAGES_AT, BOX);
  if (group) pass_turn(group);
  for (int round = 0; place(at, round, levels, heads); round++) {
    const int row = at.level * ROWS + group * TILE, k = at.head % K;
    u32 ks[STEPS][4], vs[STEPS][4];
    own.wait();
    load_left(ks, room + group * BOX);
    load_left(vs, room + (GROUPS + group) * BOX);
    leave(own.empty);
    own.next();
    float dk[SUMS], dv[SUMS];
    clear(dk);
    clear(dv);
    float s[SUMS], ds[SUMS];
    u32 p[STEPS][4], f[STEPS][4];
    auto skip = [&]() {  // no query of the tile sees a key of this warp group
      ring.wait();
      leave(ring.empty + ring.stage);
      ring.next();
      take_turn(group);
      pass_turn(group);
    };
    const int first = CAUSAL ? row / TILE : 0, last = T / TILE - 1;
    if (CAUSAL && group) skip();
    int before = ring.stage;
    ring.wait();
    take_turn(group);
    start(s, ds, ks, vs, stages + before * (STAGE >> 4));
    wgmma_commit();
    pass_turn(group);
    for (int h = 0, j = first;;) {
      const float4 *stat = (const float4 *)(room + STATS_AT + ring.stage * TILE * 8) + lane % 4;  // of two queries
      wgmma_wait<2>();
      wgmma_settle(s);
      if (CAUSAL && j == first) hide<true>(s);
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
      wgmma_wait<0>();
      wgmma_settle(dk);
      wgmma_settle(dv);
      if (h > 0 || j > first) leave(ring.empty + before);
      before = ring.stage;
      factors(p, s);
      factors(f, ds);
      ring.next();
      if (++j > last) {
        j = first;
        if (++h == share) break;
        if (CAUSAL && group) skip();
      }
      ring.wait();
      take_turn(group);
      start(s, ds, ks, vs, stages + ring.stage * (STAGE >> 4));
      mix(dv, p, stages + before * (STAGE >> 4) + (BOX >> 4));
      mix(dk, f, stages + before * (STAGE >> 4));
      wgmma_commit();
      pass_turn(group);
    }
    take_turn(group);
    wgmma_fence();
    mix(dv, p, stages + before * (STAGE >> 4) + (BOX >> 4));
    mix(dk, f, stages + before * (STAGE >> 4));
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(dk);
    wgmma_settle(dv);
    leave(ring.empty + before);
    wait_stored();
    store_tile(&dqkv, (H + k) * D, at.head / K * T + row, out, dk, scale, scale);
    store_tile(&dqkv, (H + K + k) * D, at.head / K * T + row, out + BOX, dv, 1.0f, 1.0f);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}
