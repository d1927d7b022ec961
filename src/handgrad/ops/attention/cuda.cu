// attention: y = softmax(q k' / sqrt(D), causal or not) v, with dropout of the probabilities   math: README.md §2, §3, §7
// forward   writes =  y: (N, H D) bf16;  lse: (B, H, T) f32
// backward  writes =  dqkv: (N, (H + 2 K) D) bf16, in two launches: dq and row statistics, then dk and dv from those
// numerics  bf16 factors, f32 sums; probabilities and their gradients are rounded to bf16 before they meet v, k, q, dy;
//           exponentials in base 2 to 2 ULP (ex2.approx), 2^-9 being lost in the rounding to bf16 that follows
// layout    a warp owns 32 (wide heads: 16) rows of queries (dk, dv: of keys) and streams tiles of the others through shared memory, two in
//           flight; every product is m16n8k16; scores never leave registers
// determinism  fixed order, no atomics: always the same bits
// speed     not measured yet
// source    own work, after Dao 2023 (FlashAttention-2), algorithms 1 and 2
//
// For bf16; float32.cu is for f32. Defines: D, WARPS, TALL (16-row tiles that a warp owns), CAUSAL, DROPOUT, QUADS
// (T % 4 == 0), TOGETHER (heads whose blocks run side by side), FORWARD or not.
#include "ptx.cuh"

#define DP ((D + 15) / 16 * 16)          // D in whole products; the rest is zero
#define LD (DP + 8)                      // a row in shared memory: odd in 16-byte words, so 8 rows lie in 8 x 4 banks
#define THREADS (32 * WARPS)
#define OWN (16 * TALL)                  // rows of a warp
#define ROWS (OWN * WARPS)               // rows of a block
#define TILE (16 * WARPS)                // rows of a streamed tile
#define STEPS (DP / 16)                  // products over D
#define VEC (D % 8 == 0 ? 8 : 1)         // elements of a global access
#define SPAN (TILE < 32 ? TILE : 32)     // columns of scores that the backward holds at a time
#define LOG2E 1.4426950408889634f
#define FULL 0xffffffffu

// Which rows of which head this block owns. Blocks of TOGETHER heads are neighbours, so that what they stream stays in L2;
// among them, the longest come first.
struct Place { int tile, head; };
__device__ __forceinline__ Place place(int tiles, int heads) {
  int group = blockIdx.x / (TOGETHER * tiles) * TOGETHER, within = blockIdx.x % (TOGETHER * tiles);
  int size = min(TOGETHER, heads - group);
  return {within / size, group + within % size};
}

// tile (rows, LD) = rows first .. of x (.., D), zeros outside; complete after copy_async_wait and a barrier
template <int rows> __device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *x, i64 stride, int first, int end) {
  constexpr int words = DP / 8;
  const int row_bytes = (int)stride * 2;  // one multiply-add makes an address
#pragma unroll
  for (int i = 0; i < rows * words / THREADS; i++) {
    int word = i * THREADS + threadIdx.x, r = word / words, c = word % words * 8, row = first + r;
    const bf16 *from = (const bf16 *)((const char *)(x + c) + (i64)row * row_bytes);
    if constexpr (VEC == 8) {
      copy_async(tile + r * LD + c, from, row < end && c < D);
    } else {
      Pack<bf16, 8> y;
#pragma unroll
      for (int e = 0; e < 8; e++) y.v[e] = row < end && c + e < D ? from[e] : from_float<bf16>(0.0f);
      store(tile + r * LD + c, y);
    }
  }
}

// rows first .. of y (.., D) = a warp's own rows of a tile, through that tile: o (16 M, D) times scale
template <int M> __device__ __forceinline__ void store_rows(bf16 *y, i64 stride, int first, int end, bf16 *tile,
                                                            const float (&o)[M][DP / 8][4], const float (&scale)[M][2]) {
  constexpr int words = DP / 8;
  int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < DP / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(u32 *)(tile + (m * 16 + half * 8 + lane / 4) * LD + n * 8 + lane % 4 * 2) =
            pack_bf16(o[m][n][2 * half] * scale[m][half], o[m][n][2 * half + 1] * scale[m][half]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M * 16 * words / 32; i++) {
    int word = i * 32 + lane, r = word / words, c = word % words * 8, row = first + r;
    if (row >= end) continue;
    if constexpr (VEC == 8) {
      if (c < D) store(y + row * stride + c, load<bf16, 8>(tile + r * LD + c));
    } else {
      for (int e = 0; e < 8 && c + e < D; e++) y[row * stride + c + e] = tile[r * LD + c + e];
    }
  }
}

// Where a lane looks for its part of a 16 x 16 tile: as left factor or, transposed, as right one; and as right factor.
__device__ __forceinline__ int left_lane() { return threadIdx.x % 16 * LD + threadIdx.x % 32 / 16 * 8; }
__device__ __forceinline__ int right_lane() {
  int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
}

// The left factor (16 M, D): held in registers where D is small, else read from shared memory every time.
template <int M, bool held> struct Left {
  u32 f[M][held ? STEPS : 1][4];
  const bf16 *at;
  __device__ __forceinline__ Left(const bf16 *rows) : at(rows + left_lane()) {
    if constexpr (held)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < STEPS; k++) load_matrix(f[m][k], at + m * 16 * LD + k * 16);
  }
  __device__ __forceinline__ void get(u32 (&x)[4], int m, int k) const {
    if constexpr (held) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = f[m][k][i];
    } else {
      load_matrix(x, at + m * 16 * LD + k * 16);
    }
  }
};

// s (16 M, 8 N) = a (16 M, D) b' with b (8 N, D)
template <int M, int N, bool held>
__device__ __forceinline__ void scores(float (&s)[M][N][4], const Left<M, held> &a, const bf16 *b) {
  b += right_lane();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 x[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) a.get(x[m], m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 y[4];
      load_matrix(y, b + n * 8 * LD + k * 16);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_bf16(s[m][n], x[m], y[0], y[1]);
        mma_bf16(s[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// Scores as the left factor of the next product: sums lie in registers just as left factors do.
template <int M, int N>
__device__ __forceinline__ void factors(u32 (&p)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) p[m][k][i] = pack_bf16(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

// o (16 M, D) += p (16 M, 8 N) b with b (8 N, D)
template <int M, int N>
__device__ __forceinline__ void mix(float (&o)[M][DP / 8][4], const u32 (&p)[M][N / 2][4], const bf16 *b) {
  b += left_lane();
#pragma unroll
  for (int k = 0; k < N / 2; k++)
#pragma unroll
    for (int n = 0; n < DP / 8; n += 2) {
      u32 y[4];
      load_matrix_transposed(y, b + k * 16 * LD + n * 8);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_bf16(o[m][n], p[m][k], y[0], y[1]);
        mma_bf16(o[m][n + 1], p[m][k], y[2], y[3]);
      }
    }
}

template <int M> __device__ __forceinline__ void clear(float (&o)[M][DP / 8][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < DP / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[m][n][e] = 0.0f;
}

// Bit i says whether element 4 quad + i is kept.
__device__ __forceinline__ u32 kept_quad(const DropoutRule &rule, i64 quad) {
  uint4 r = rule.bits(quad);
  return (r.x >= rule.threshold) | (r.y >= rule.threshold) << 1 | (r.z >= rule.threshold) << 2 | (r.w >= rule.threshold) << 3;
}
__device__ __forceinline__ u32 kept_one(const DropoutRule &rule, i64 element) {
  return kept_quad(rule, element / 4) >> element % 4 & 1;
}

// Of a lane's four scores of a 16 x 8 tile, bit e says whether the e-th is kept. `element` counts that of the tile's first
// row and column. Where quads of the generator do not cross rows, each lane draws one and passes on what is not its own.
__device__ __forceinline__ u32 kept(const DropoutRule &rule, i64 element, i64 T) {  // rows are queries
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (QUADS) {
    u32 mine = kept_quad(rule, (element + (g + t % 2 * 8) * T) / 4 + t / 2), other = __shfl_xor_sync(FULL, mine, 1);
    u32 top = t % 2 ? other : mine, low = t % 2 ? mine : other;
    return (top >> t % 2 * 2 & 3) | (low >> t % 2 * 2 & 3) << 2;
  } else {
    u32 bits = 0;
#pragma unroll 1
    for (int e = 0; e < 4; e++) bits |= kept_one(rule, element + (g + e / 2 * 8) * T + t * 2 + e % 2) << e;
    return bits;
  }
}
__device__ __forceinline__ u32 kept_transposed(const DropoutRule &rule, i64 element, i64 T) {  // columns are queries
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 bits = 0;
  if constexpr (QUADS) {
    int j = g % 4;
    u32 mine = kept_quad(rule, (element + (t * 2 + j % 2) * T) / 4 + g / 4 + j / 2 * 2);
#pragma unroll
    for (int e = 0; e < 4; e++) bits |= (__shfl_sync(FULL, mine, (lane & ~12) | e << 2) >> j & 1) << e;
  } else {
#pragma unroll 1
    for (int e = 0; e < 4; e++) bits |= kept_one(rule, element + (t * 2 + e % 2) * T + g + e / 2 * 8) << e;
  }
  return bits;
}

#if FORWARD
KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_forward_kernel(
    bf16 *y,            // (N, H D)
    float *lse,         // (B, H, T)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const Knobs *knobs, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
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
  DropoutRule rule(knobs, p, stream);

  load_tile<ROWS>(q_tile, q, stride, row0, T);
  load_tile<TILE>(stages, k, stride, 0, T);
  load_tile<TILE>(stages + TILE * LD, v, stride, 0, T);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  Left<TALL, (DP <= 64)> left(q_tile + warp * OWN * LD);
  float o[TALL][DP / 8][4], top[TALL][2], sum[TALL][2];
  clear(o);
#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) top[i / 2][i % 2] = -HG_INF, sum[i / 2][i % 2] = 0.0f;

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

    float s[TALL][TILE / 8][4];
    scores(s, left, k_tile);
    if (CAUSAL ? key0 + TILE - 1 > own : key0 + TILE > T)
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (key0 + n * 8 + t * 2 + e % 2 > (CAUSAL ? own + m * 16 + e / 2 * 8 + g : T - 1)) s[m][n][e] = -HG_INF;

    // The maximum moves only when it grows by more than 8 in the exponent of 2: 2^8 harms no sum, and o is rarely rescaled.
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
    if (__any_sync(FULL, grows))
#pragma unroll
      for (int i = 0; i < 2 * TALL; i++) {
        float &old = top[i / 2][i % 2], higher = fmaxf(old, highest[i / 2][i % 2]);
        float shrink = exp2_fast((old - higher) * scale2);
        old = higher;
        sum[i / 2][i % 2] *= shrink;
#pragma unroll
        for (int n = 0; n < DP / 8; n++) o[i / 2][n][i % 2 * 2] *= shrink, o[i / 2][n][i % 2 * 2 + 1] *= shrink;
      }
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
    if constexpr (DROPOUT)
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
          u32 bits = kept(rule, ((i64)at.head * T + own + m * 16) * T + key0 + n * 8, T);
#pragma unroll
          for (int e = 0; e < 4; e++) s[m][n][e] = bits >> e & 1 ? s[m][n][e] : 0.0f;
        }
    u32 f[TALL][TILE / 16][4];
    factors(f, s);
    mix<TALL, TILE / 8>(o, f, v_tile);
  }

#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) {
    float total = sum[i / 2][i % 2];
    total += __shfl_xor_sync(FULL, total, 1);
    total += __shfl_xor_sync(FULL, total, 2);
    int row = own + i / 2 * 16 + i % 2 * 8 + g;
    if (t == 0 && row < T) lse[(i64)at.head * T + row] = top[i / 2][i % 2] * scale + logf(total);
    sum[i / 2][i % 2] = rule.scale / total;
  }
  store_rows(y + (at.head / (int)H * T * H + h) * D, H * D, own, T, q_tile + warp * OWN * LD, o, sum);
}

#else

struct alignas(8) Stat { float lse, delta; };  // of a query row: lse in base 2, rowsum of dy y

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dq_kernel(
    bf16 *dqkv,         // (N, H + 2 K, D): the first H
    Stat *stats,        // (B, H, T up to whole blocks)
    const bf16 *dy,     // (N, H D)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const bf16 *y,      // (N, H D)
    const float *lse,   // (B, H, T)
    const Knobs *knobs, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
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
  DropoutRule rule(knobs, p, stream);

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
  Left<TALL, (DP <= 64)> left(q_tile + warp * OWN * LD);
  Left<TALL, false> left_dy(dy_tile + warp * OWN * LD);
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
    for (int part = 0; part < TILE; part += SPAN) {
      const int key0 = j * TILE + part;
      if (CAUSAL && key0 > own + OWN - 1) break;
      float s[TALL][SPAN / 8][4], ds[TALL][SPAN / 8][4];
      scores(s, left, k_tile + part * LD);
      scores(ds, left_dy, v_tile + part * LD);
      if (CAUSAL ? key0 + SPAN - 1 > own : key0 + SPAN > T)
#pragma unroll
        for (int m = 0; m < TALL; m++)
#pragma unroll
          for (int n = 0; n < SPAN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (key0 + n * 8 + t * 2 + e % 2 > (CAUSAL ? own + m * 16 + e / 2 * 8 + g : T - 1)) s[m][n][e] = -HG_INF;
#pragma unroll
      for (int m = 0; m < TALL; m++)
#pragma unroll
        for (int n = 0; n < SPAN / 8; n++) {
          u32 bits = 15;
          if constexpr (DROPOUT) bits = kept(rule, ((i64)at.head * T + own + m * 16) * T + key0 + n * 8, T);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float prob = exp2_fast(s[m][n][e] * scale2 - base[m][e / 2]);
            float dprob = DROPOUT ? (bits >> e & 1 ? ds[m][n][e] * rule.scale : 0.0f) : ds[m][n][e];
            ds[m][n][e] = prob * (dprob - delta[m][e / 2]);
          }
        }
      u32 f[TALL][SPAN / 16][4];
      factors(f, ds);
      mix<TALL, SPAN / 8>(dq, f, k_tile + part * LD);
    }
  }
  float scales[TALL][2];
#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) scales[i / 2][i % 2] = scale;
  store_rows(dqkv + start, stride, own, T, q_tile + warp * OWN * LD, dq, scales);
}

KERNEL __launch_bounds__(THREADS, 256 / THREADS) attention_backward_dkdv_kernel(
    bf16 *dqkv,         // (N, H + 2 K, D): the last 2 K
    const Stat *stats,  // (B, H, T up to whole blocks)
    const bf16 *dy,     // (N, H D)
    const bf16 *qkv,    // (N, H + 2 K, D)
    const Knobs *knobs, i64 N, i64 T_, i64 H, i64 K, float p, i64 stream) {
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
  const Stat *stats0 = stats + (b * H + head0) * padded;
  const int first = CAUSAL ? row0 / TILE : 0, tiles = (T + TILE - 1) / TILE - first;
  const float scale = rsqrtf((float)D), scale2 = scale * LOG2E;
  DropoutRule rule(knobs, p, stream);

  auto fetch = [&](int stage, int head, int tile) {
    bf16 *to = stages + stage * 2 * TILE * LD;
    load_tile<TILE>(to, q + head * D, stride, tile * TILE, T);
    load_tile<TILE>(to + TILE * LD, dy0 + head * D, H * D, tile * TILE, T);
    if (threadIdx.x < TILE / 2) {
      int i = threadIdx.x * 2;
      copy_async(stat_stages + stage * TILE + i, stats0 + (i64)head * padded + tile * TILE + i);
    }
    copy_async_commit();
  };
  load_tile<ROWS>(k_tile, qkv + start, stride, row0, T);
  load_tile<ROWS>(v_tile, qkv + start + K * D, stride, row0, T);
  fetch(0, 0, first);
  const Left<TALL, false> left(k_tile + warp * OWN * LD), left_v(v_tile + warp * OWN * LD);
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
    for (int part = 0; part < TILE; part += SPAN) {
      const int query0 = here + part;
      if (CAUSAL && query0 + SPAN - 1 < own) continue;  // no query sees a key of this warp
      float s[TALL][SPAN / 8][4], ds[TALL][SPAN / 8][4];
      scores(s, left, q_tile + part * LD);
      scores(ds, left_v, dy_tile + part * LD);
      if (CAUSAL && query0 < own + OWN - 1)
#pragma unroll
        for (int m = 0; m < TALL; m++)
#pragma unroll
          for (int n = 0; n < SPAN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (own + m * 16 + e / 2 * 8 + g > query0 + n * 8 + t * 2 + e % 2) s[m][n][e] = -HG_INF;
#pragma unroll
      for (int n = 0; n < SPAN / 8; n++) {
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
      u32 f[TALL][SPAN / 16][4];
      factors(f, s);
      mix<TALL, SPAN / 8>(dv, f, dy_tile + part * LD);
      factors(f, ds);
      mix<TALL, SPAN / 8>(dk, f, q_tile + part * LD);
    }
  }
  float scales[TALL][2], scales_v[TALL][2];
#pragma unroll
  for (int i = 0; i < 2 * TALL; i++) scales[i / 2][i % 2] = scale, scales_v[i / 2][i % 2] = rule.scale;
  store_rows(dqkv + start, stride, own, T, k_tile + warp * OWN * LD, dk, scales);
  store_rows(dqkv + start + K * D, stride, own, T, v_tile + warp * OWN * LD, dv, scales_v);
}
#endif
