// attention: y = softmax(q k' / sqrt(D), causal or not) v, with dropout of the probabilities     math: README.md §2, §7
// forward   writes =  y: (N, H D) bf16;  lse: (B, H, T) f32
// numerics  f32 softmax and sums; probabilities are rounded to bf16 for the matmul with v; exponentials in base 2 to 2
//           ULP (ex2.approx), an error that this rounding hides
// layout    a warp owns 32 queries (wide heads, dropout: 16), in registers, and streams tiles of keys and values, two
//           in flight; scores never leave registers
// determinism  fixed order, no atomics
// speed     not measured yet
// source    own work, after Dao 2023 (FlashAttention-2), algorithm 1
#include "mma.cuh"

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
        float base = top[m][half] * scale2, total = 0.0f;
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

// Zeroes dropped probabilities. element: the index of the first one among all (B, H, T, T).
__device__ __forceinline__ void drop(Scores &s, const DropoutRule &rule, i64 element, i64 T) {
#pragma unroll
  for (int m = 0; m < TALL; m++)
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
      u32 bits = kept(rule, element + m * 16 * T + n * 8, T);
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = bits >> e & 1 ? s[m][n][e] : 0.0f;
    }
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_forward_mma_kernel(
    bf16 *y,            // (N, H D)
    float *lse,         // (B, H, T)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const StepScalars *scalars, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
  HG_SHARED(bf16, q_tile);  // (ROWS, LD), then twice k, v (TILE, LD)
  bf16 *stages = q_tile + ROWS * LD;
  const int T = (int)T_, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const i64 stride = (H + 2 * K) * D;
  const int blocks = (T + ROWS - 1) / ROWS;
  Place at = place(blocks, (int)(N / T * H));
  const int row0 = (blocks - 1 - at.tile) * ROWS, own = row0 + warp * OWN, h = at.head % (int)H;
  const bf16 *q = qkv + at.head / (int)H * T * stride + h * D;
  const bf16 *k = q + (H - h + h / (H / K)) * D, *v = k + K * D;
  const int tiles = ((CAUSAL ? min(T, row0 + ROWS) : T) + TILE - 1) / TILE;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  DropoutRule rule(scalars, p, stream);

  load_tile<ROWS>(q_tile, q, stride, row0, T);
  load_tile<TILE>(stages, k, stride, 0, T);
  load_tile<TILE>(stages + TILE * LD, v, stride, 0, T);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  OperandA<TALL, STEPS> q_operand(q_tile + warp * OWN * LD);
  Outputs o;
  Softmax softmax;
  clear(o);

  for (int j = 0; j < tiles; j++) {
    const bf16 *k_tile = stages + j % 2 * 2 * TILE * LD, *v_tile = k_tile + TILE * LD;
    const int key0 = j * TILE;
    copy_async_wait<0>();
    __syncthreads();
    if (j + 1 < tiles) {
      bf16 *next = stages + (j + 1) % 2 * 2 * TILE * LD;
      load_tile<TILE>(next, k, stride, key0 + TILE, T);
      load_tile<TILE>(next + TILE * LD, v, stride, key0 + TILE, T);
      copy_async_commit();
    }
    if (CAUSAL && key0 > own + OWN - 1) continue;  // no row of this warp sees the tile

    Scores s;
    scores(s, q_operand, k_tile);
    if (CAUSAL ? key0 + TILE - 1 > own : key0 + TILE > T)
      causal_mask<CAUSAL>(s, key0 + t * 2 - (CAUSAL ? own + g : T - 1));
    softmax.raise(s, o, scale2);
    softmax.exponentiate(s, scale2);
    if constexpr (DROPOUT) drop(s, rule, ((i64)at.head * T + own) * T + key0, T);
    u32 f[TALL][TILE / 16][4];
    to_operand_a(f, s);
    pv_gemm<TALL, TILE / 8>(o, f, v_tile);
  }

#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) {
    float &sum = softmax.sum[i / 2][i % 2], total = sum;
    total += __shfl_xor_sync(FULL, total, 1);
    total += __shfl_xor_sync(FULL, total, 2);
    int row = own + i / 2 * 16 + i % 2 * 8 + g;
    if (t == 0 && row < T) lse[(i64)at.head * T + row] = softmax.top[i / 2][i % 2] * scale + logf(total);
    sum = rule.scale / total;
  }
  store_rows(y + (at.head / (int)H * T * H + h) * D, H * D, own, T, q_tile + warp * OWN * LD, o, softmax.sum);
}
