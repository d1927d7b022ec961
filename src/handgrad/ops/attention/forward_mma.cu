// attention: y = softmax(scale q k' + bias, over the keys that a query sees) v, with dropout      math: README.md §2, §7
// forward   writes =  y: (N, H D) bf16;  lse: (B, H, T) f32
// numerics  f32 softmax and sums; probabilities are rounded to bf16 for the matmul with v; exponentials in base 2 to 2
//           ULP (ex2.approx), an error that this rounding hides
// layout    a warp owns 32 queries (wide heads, dropout: 16), in registers, and streams tiles of keys and values, two
//           in flight; scores never leave registers
// determinism  fixed order, no atomics
// speed     not measured yet
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 1
#include "mma.cuh"

#define HELD_Q (WIDE ? 0 : STEPS)  // steps of the A operand that stay in registers

typedef float Scores[TALL][TILE / 8][4];
typedef float Outputs[TALL][DP / 8][4];

// Online softmax of a lane's rows, two in each 16-row tile.
struct Softmax {
  float top[TALL][2], sum[TALL][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
      top[i / 2][i % 2] = -HG_INF;
      sum[i / 2][i % 2] = 0.0f;
    }
  }
  // Raises the maxima to those of the scores and shrinks o and the sums, if a maximum grows by more than 8 in base 2:
  // a factor of 2^8 does no harm, and o is rarely rescaled.
  __device__ __forceinline__ void raise(const Scores &s, Outputs &o, float scale2) {
    float highest[TALL][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
      float x = -HG_INF;
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) x = fmaxf(x, fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
      x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
      x = fmaxf(x, __shfl_xor_sync(FULL, x, 2));
      highest[i / 2][i % 2] = x;
      grows |= x * scale2 > top[i / 2][i % 2] * scale2 + 8.0f;
    }
    if (!__any_sync(FULL, grows)) return;
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
      float &old = top[i / 2][i % 2], higher = fmaxf(old, highest[i / 2][i % 2]);
      if (RANGES && higher == -HG_INF) continue;  // a row that has seen no key
      float shrink = exp2_fast((old - higher) * scale2);
      old = higher;
      sum[i / 2][i % 2] *= shrink;
#pragma unroll
      for (int n = 0; n < DP / 8; n++) {
        o[i / 2][n][i % 2 * 2] *= shrink;
        o[i / 2][n][i % 2 * 2 + 1] *= shrink;
      }
    }
  }
  // Scores become e^(score - maximum), not yet divided by their sum.
  __device__ __forceinline__ void exponentiate(Scores &s, float scale2) {
#pragma unroll
    for (int m = 0; m < TALL; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float base = RANGES && top[m][half] == -HG_INF ? 0.0f : top[m][half] * scale2, total = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            s[m][n][e] = exp2_fast(s[m][n][e] * scale2 - base);
            total += s[m][n][e];
          }
        sum[m][half] += total;
      }
  }
};

// Zeroes dropped probabilities. element: the index of the first one among all (B, H, T, S).
__device__ __forceinline__ void drop(Scores &s, const DropoutRule &rule, i64 element, i64 S) {
#pragma unroll
  for (int m = 0; m < TALL; m++)
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
      u32 bits = kept(rule, element + m * 16 * S + n * 8, S);
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = bits >> e & 1 ? s[m][n][e] : 0.0f;
    }
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_forward_mma_kernel(
    bf16 *y,                   // (N, H D)
    float *lse,                // (B, H, T)
    const bf16 *qkv,           // (N, H + 2 K, D); with kv (N, H, D)
    const bf16 *kv,            // (M, 2 K, D)
    const bf16 *rel,           // (R, H)
    const int *first_key,      // (N)
    const int *last_key,       // (N)
    const StepScalars *scalars, i64 N, i64 T_, i64 S_, i64 H_, i64 K_, float scale, float p, i64 stream) {
  HG_SHARED(bf16, q_tile);  // (ROWS, LD), then twice k, v (TILE, LD)
  bf16 *stages = q_tile + ROWS * LD;
  const View view(T_, S_, H_, K_, first_key, last_key);
  const int T = view.T, S = view.S, H = view.H, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int blocks = (T + ROWS - 1) / ROWS;
  Place at = place(blocks, (int)(N / T * H));
  const int row0 = (blocks - 1 - at.tile) * ROWS, own = row0 + warp * OWN, h = at.head % H, b = at.head / H;
  const bf16 *k = (CROSS ? kv : qkv) + view.k_start(b, h / (H / view.K)), *v = k + view.K * D;
  const i64 stride = view.kv_stride();
  const Range seen = view.keys_of_block(b, row0);
  const int first = seen.low / TILE, tiles = (seen.high + TILE) / TILE;
  const float unit = BUCKETS ? 1.0f : scale, scale2 = unit * LOG2E;
  DropoutRule rule(scalars, p, stream);

  load_tile<ROWS>(q_tile, qkv + view.q_start(b, h), view.q_stride(), row0, T);
  load_tile<TILE>(stages, k, stride, first * TILE, S);
  load_tile<TILE>(stages + TILE * LD, v, stride, first * TILE, S);
  copy_async_commit();
#if BUCKETS
  __shared__ Biases biases;
  biases.load(rel, H, h);
#endif
  Range keys[TALL][2];
  if constexpr (RANGES) load_ranges(keys, view, b, own + g);
  copy_async_wait<0>();
  __syncthreads();
  OperandA<TALL, HELD_Q> q_operand(q_tile + warp * OWN * LD);
  Outputs o;
  Softmax softmax;
  clear(o);

  for (int j = first; j < tiles; j++) {
    const bf16 *k_tile = stages + (j - first) % 2 * 2 * TILE * LD, *v_tile = k_tile + TILE * LD;
    const int key0 = j * TILE;
    copy_async_wait<0>();
    __syncthreads();
    if (j + 1 < tiles) {
      bf16 *next = stages + (j + 1 - first) % 2 * 2 * TILE * LD;
      load_tile<TILE>(next, k, stride, key0 + TILE, S);
      load_tile<TILE>(next + TILE * LD, v, stride, key0 + TILE, S);
      copy_async_commit();
    }
    if (CAUSAL && key0 > own + OWN - 1) continue;  // no row of this warp sees the tile
    if (WINDOW && key0 + TILE - 1 <= own - WINDOW) continue;

    Scores s;
    scores(s, q_operand, k_tile);
#if BUCKETS
    add_bias<false>(s, biases.bias, scale, key0 + t * 2 - own - g);
#endif
    if constexpr (RANGES) range_mask(s, keys, key0 + t * 2);
    else if (CAUSAL ? key0 + TILE - 1 > own : key0 + TILE > S)
      causal_mask<CAUSAL>(s, key0 + t * 2 - (CAUSAL ? own + g : S - 1));
    softmax.raise(s, o, scale2);
    softmax.exponentiate(s, scale2);
    if constexpr (DROPOUT) drop(s, rule, ((i64)at.head * T + own) * S + key0, S);
    scores_gemm(o, s, v_tile);
  }

#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) {
    float &sum = softmax.sum[i / 2][i % 2], total = sum;
    total += __shfl_xor_sync(FULL, total, 1);
    total += __shfl_xor_sync(FULL, total, 2);
    const int row = own + i / 2 * 16 + i % 2 * 8 + g;
    const bool sees = !RANGES || total > 0.0f;
    if (t == 0 && row < T)
      lse[(i64)at.head * T + row] = sees ? softmax.top[i / 2][i % 2] * unit + logf(total) : 0.0f;
    sum = sees ? rule.scale / total : 0.0f;
  }
  store_rows(y + ((i64)b * T * H + h) * D, (i64)H * D, own, T, q_tile + warp * OWN * LD, o, softmax.sum);
}
