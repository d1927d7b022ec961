// attention: y = softmax(q k' / sqrt(D), causal or not) v, on Hopper's tensor cores (sm_90a)       math: README.md §2, §7
// forward   writes =  y: (N, H D) bf16;  lse: (B, H, T) f32
// needs     D = 64, T % 128 == 0, no dropout
// numerics  f32 softmax and sums; the probabilities are rounded to bf16 before they meet v; exponentials in base 2 to
//           2 ULP (ex2.approx), of which that rounding leaves nothing
// layout    a warp group owns 64 queries, held in registers, and streams 128 keys and values at a time, as two tiles; while
//           their scores become probabilities, the product of those before them and v is on its way
// determinism  fixed order, no atomics
// speed     H100 80GB, B=64 T=1024 H=12 causal, 2026-11-25: 0.325 ms, 317 TFLOP/s; cuDNN 9.20 in the same run 0.295 to 0.298 ms
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 1; Shah et al. 2024 (FlashAttention-3)
#include "groups.cuh"

enum {
  STAGES = 4,
  STAGE = 4 * BOX,  // two tiles of k, two of v
  STAGES_AT = GROUPS * BOX, OUT_AT = STAGES_AT + STAGES * STAGE, BARRIERS_AT = OUT_AT + GROUPS * BOX
};

KERNEL __launch_bounds__(THREADS, 1) attention_forward_kernel(
    const __grid_constant__ TensorMap y,
    const __grid_constant__ TensorMap qkv,
    float *lse,         // (B, H, T)
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
      u64 *full = own.fill(GROUPS * BOX);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) tma_load(room + g * BOX, &qkv, h * D, first + row + g * TILE, full);
      own.next();
      for (int j = 0; j < (CAUSAL ? row + ROWS : T); j += 2 * TILE, ring.next()) {
        full = ring.fill(STAGE);
        char *to = room + STAGES_AT + ring.stage * STAGE;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          tma_load(to + i * BOX, &qkv, k * D, first + j + i * TILE, full);
          tma_load(to + (2 + i) * BOX, &qkv, (k + K) * D, first + j + i * TILE, full);
        }
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
    const int turns = CAUSAL ? row / ROWS + 1 : T / ROWS;
    u32 q[STEPS][4], p[2][STEPS][4];
    own.wait();
    load_left(q, room + group * BOX);
    leave(own.empty);
    own.next();

    float o[SUMS], s[2][SUMS], top[2] = {-HG_INF, -HG_INF}, sum[2] = {0.0f, 0.0f}, shrink[2];  // of rows g and g + 8
    bool grows = false;
    // Scores become e^(score - maximum), not yet divided by their sum. The maximum moves only when it grows by more than
    // 8 in the exponent of 2: 2^8 harms no sum, and what was added up so far rarely has to shrink.
    auto probabilities = [&](bool diagonal) {
      if (diagonal) {
        if (group == 0) {
          hide<false>(s[0]);
#pragma unroll
          for (int i = 0; i < SUMS; i++) s[1][i] = -HG_INF;
        } else {
          hide<false>(s[1]);
        }
      }
      float highest[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x[4] = {-HG_INF, -HG_INF, -HG_INF, -HG_INF};  // not one long chain
#pragma unroll
        for (int i = 2 * r; i < SUMS; i += 4) {
#pragma unroll
          for (int e = 0; e < 4; e++) x[e] = fmaxf(x[e], s[e / 2][i + e % 2]);
        }
        highest[r] = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
      }
      grows = __any_sync(0xffffffffu, highest[0] * scale2 > top[0] * scale2 + 8.0f || highest[1] * scale2 > top[1] * scale2 + 8.0f);
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
    };
    auto start = [&]() {
      wgmma_fence();
      scores(s[0], q, stages + ring.stage * (STAGE >> 4));
      scores(s[1], q, stages + ring.stage * (STAGE >> 4) + (BOX >> 4));
      wgmma_commit();
    };
    auto mix_both = [&](int stage) {
      mix(o, p[0], stages + stage * (STAGE >> 4) + (2 * BOX >> 4));
      mix(o, p[1], stages + stage * (STAGE >> 4) + (3 * BOX >> 4));
      wgmma_commit();
    };
    int here = ring.stage;
    ring.wait();
    take_turn(group);
    start();
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(s[0]);
    wgmma_settle(s[1]);
    probabilities(CAUSAL && turns == 1);
    factors(p[0], s[0]);
    factors(p[1], s[1]);
    clear(o);
    for (int j = 1; j < turns; j++) {
      ring.next();
      ring.wait();
      take_turn(group);
      start();
      mix_both(here);
      pass_turn(group);
      wgmma_wait<1>();
      wgmma_settle(s[0]);
      wgmma_settle(s[1]);
      probabilities(CAUSAL && j + 1 == turns);
      wgmma_wait<0>();
      wgmma_settle(o);
      leave(ring.empty + here);
      here = ring.stage;
      if (grows)
#pragma unroll
        for (int i = 0; i < SUMS; i++) o[i] *= shrink[i % 4 / 2];
      factors(p[0], s[0]);
      factors(p[1], s[1]);
    }
    take_turn(group);
    wgmma_fence();
    mix_both(here);
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(o);
    leave(ring.empty + here);
    ring.next();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      if (lane % 4 == 0) lse[(i64)at.head * T + row + warp * 16 + r * 8 + lane / 4] = top[r] * scale + logf(sum[r]);
    }
    wait_stored();
    store_tile(&y, h * D, at.head / H * T + row, out, o, 1.0f / sum[0], 1.0f / sum[1]);
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}
