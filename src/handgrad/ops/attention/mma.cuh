// Attention in bf16 with mma: which rows a block owns, tiles in shared memory, matmuls of fragments, dropout.
// forward_mma.cu and backward_mma.cu build on it.                                            math: README.md §2, §3, §7
//
// layout    a warp owns OWN = 16 TALL rows; tiles of TILE rows stream through shared memory; every matmul is m16n8k16
// numerics  bf16 operands, float accumulators
// source    own work, after Dao 2023 (FlashAttention-2)
//
// Defines (op.py): those of visible.cuh, WARPS, TALL (16-row tiles that a warp owns), LD (elements of a row in shared
// memory: an odd number of 16-byte words, so that 8 rows lie in 8 x 4 banks), DROPOUT, QUADS (S % 4 == 0), TOGETHER
// (heads whose blocks run side by side).
#pragma once
#include "ptx.cuh"
#if !defined(D) || !defined(WARPS) || !defined(TALL) || !defined(LD) || !defined(QUADS) || !defined(TOGETHER)
#error "attention/op.py defines the sizes"
#endif
#if !defined(DROPOUT)
#error "attention/op.py defines DROPOUT"
#endif

#define DP ((D + 15) / 16 * 16)          // D padded to whole mma steps; the rest is zero
#define THREADS (32 * WARPS)
#define OWN (16 * TALL)                  // rows of a warp
#define ROWS (OWN * WARPS)               // rows of a block
#define TILE (16 * WARPS)                // rows of a streamed tile
#define STEPS (DP / 16)                  // of a matmul over D
#define VEC (D % 8 == 0 ? 8 : 1)         // elements of a global access
#define WIDE (DP > 128)                  // outputs alone fill half of the registers: loops are unrolled less
#define LOG2E 1.4426950408889634f
#include "visible.cuh"

// Which rows of which head this block owns. Blocks of TOGETHER heads are neighbours, so that what they stream stays in
// L2; among them, the longest come first.
struct Place { int tile, head; };
__device__ __forceinline__ Place place(int tiles, int heads) {
  int group = blockIdx.x / (TOGETHER * tiles) * TOGETHER, within = blockIdx.x % (TOGETHER * tiles);
  int size = min(TOGETHER, heads - group);
  return {within / size, group + within % size};
}

// tile (rows, LD) = rows first .. of x (.., D), zeros outside; complete after copy_async_wait and a barrier
template <int rows>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *x, i64 stride, int first, int end) {
  constexpr int words = DP / 8;
  const int row_bytes = (int)stride * 2;  // one multiply-add makes an address
#pragma unroll WIDE ? 2 : rows * words / THREADS
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
template <int M>
__device__ __forceinline__ void store_rows(bf16 *y, i64 stride, int first, int end, bf16 *tile,
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

template <int M>
__device__ __forceinline__ void store_rows(bf16 *y, i64 stride, int first, int end, bf16 *tile,
                                           const float (&o)[M][DP / 8][4], float scale) {
  float scales[M][2];
#pragma unroll
  for (int i = 0; i < 2 * M; i++) scales[i / 2][i % 2] = scale;
  store_rows(y, stride, first, end, tile, o, scales);
}

// Where a lane finds its part of a 16 x 16 tile: as A operand or, transposed, as B operand; and as B operand.
__device__ __forceinline__ int a_lane() { return threadIdx.x % 16 * LD + threadIdx.x % 32 / 16 * 8; }
__device__ __forceinline__ int b_lane() {
  int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
}

// The A operand (16 M, D): its first `held` steps stay in registers, the others are read from shared memory each time.
template <int M, int held> struct OperandA {
  u32 f[M][held ? held : 1][4];
  const bf16 *at;
  __device__ __forceinline__ OperandA(const bf16 *rows) : at(rows + a_lane()) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int k = 0; k < held; k++) load_matrix(f[m][k], at + m * 16 * LD + k * 16);
  }
  __device__ __forceinline__ void get(u32 (&x)[4], int m, int k) const {
    if (k >= held) return load_matrix(x, at + m * 16 * LD + k * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = f[m][k][i];
  }
};

// s (16 M, 8 N) = a (16 M, D) b' with b (8 N, D)
template <int M, int N, int held>
__device__ __forceinline__ void scores(float (&s)[M][N][4], const OperandA<M, held> &a, const bf16 *b) {
  b += b_lane();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll WIDE ? 2 : STEPS
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

// Scores as the A operand of the next matmul: accumulators and A operands have the same layout in registers.
template <int M, int N>
__device__ __forceinline__ void to_operand_a(u32 (&p)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *two = s[m][2 * k + i / 2] + i % 2 * 2;
        p[m][k][i] = pack_bf16(two[0], two[1]);
      }
}

// o (16 M, D) += p (16 M, 8 N) b with b (8 N, D)
template <int M, int N>
__device__ __forceinline__ void pv_gemm(float (&o)[M][DP / 8][4], const u32 (&p)[M][N / 2][4], const bf16 *b) {
  b += a_lane();
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

// The same with s, rounded to bf16, as p.
template <int M, int N>
__device__ __forceinline__ void scores_gemm(float (&o)[M][DP / 8][4], const float (&s)[M][N][4], const bf16 *b) {
  u32 p[M][N / 2][4];
  to_operand_a(p, s);
  pv_gemm<M, N>(o, p, b);
}

template <int M> __device__ __forceinline__ void clear(float (&o)[M][DP / 8][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < DP / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[m][n][e] = 0.0f;
}

// Scores become -inf where their column comes after their row; x: the lane's first column minus its first row. Without
// `rows`: where it comes after a limit that is the same for all rows; `transposed`: where the row comes after the
// column.
template <bool rows, bool transposed = false, int M, int N>
__device__ __forceinline__ void causal_mask(float (&s)[M][N][4], int x) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = rows ? m * 16 + e / 2 * 8 : 0, column = n * 8 + e % 2;
        if (x > (transposed ? column - row : row - column)) s[m][n][e] = -HG_INF;
      }
}

// The same for any ranges: rows are queries; `key` is the lane's first column.
template <int M, int N>
__device__ __forceinline__ void range_mask(float (&s)[M][N][4], const Range (&keys)[M][2], int key) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int at = key + n * 8 + e % 2;
        if (at < keys[m][e / 2].low || at > keys[m][e / 2].high) s[m][n][e] = -HG_INF;
      }
}

// The ranges of a lane's rows, from `row` on.
template <int M>
__device__ __forceinline__ void load_ranges(Range (&keys)[M][2], const View &view, int b, int row) {
#pragma unroll
  for (int i = 0; i < 2 * M; i++) keys[i / 2][i % 2] = view.keys(b, row + i * 8);
}

#if BUCKETS
// Scores become scaled, with the bias of their distance; x: the lane's first column minus its first row. `transposed`:
// rows are keys.
template <bool transposed, int M, int N>
__device__ __forceinline__ void add_bias(float (&s)[M][N][4], const float *bias, float scale, int x) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int d = x + n * 8 + e % 2 - m * 16 - e / 2 * 8;
        s[m][n][e] = s[m][n][e] * scale + bias[near(transposed ? -d : d)];
      }
}

// sums += gradients of scores, by distance; x: the first column minus the first row. A lane adds two diagonals of a 16
// x 8 N tile, which it reads from shared memory of its warp: (16, 8 N + 1).
template <int M, int N>
__device__ __forceinline__ void add_diagonals(BiasSums &sums, const float (&ds)[M][N][4], float *tile, int x) {
  enum { W = 8 * N, LINE = W + 1 };
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        tile[(lane / 4 + e / 2 * 8) * LINE + n * 8 + lane % 4 * 2 + e % 2] = ds[m][n][e];
    __syncwarp();
#pragma unroll
    for (int diagonal = lane - 15; diagonal < W + 17; diagonal += 32) {  // column minus row; a lane adds to its own
      float sum = 0.0f;
      for (int row = 0; row < 16; row++)
        if (diagonal + row >= 0 && diagonal + row < W) sum += tile[row * LINE + diagonal + row];
      sums.add(x - m * 16 + diagonal, sum);
    }
  }
}
#endif

// Bit i says whether element 4 quad + i is kept.
__device__ __forceinline__ u32 kept_quad(const DropoutRule &rule, i64 quad) {
  uint4 r = rule.bits(quad);
  u32 least = rule.threshold;
  return (r.x >= least) | (r.y >= least) << 1 | (r.z >= least) << 2 | (r.w >= least) << 3;
}
__device__ __forceinline__ u32 kept_one(const DropoutRule &rule, i64 element) {
  return kept_quad(rule, element / 4) >> element % 4 & 1;
}

// Of a lane's four scores of a 16 x 8 tile, bit e says whether the e-th is kept. `element` is the index of the tile's
// first, S the keys of a row. Where quads of the generator do not cross rows, each lane draws one quad and shuffles
// bits to other lanes.
__device__ __forceinline__ u32 kept(const DropoutRule &rule, i64 element, i64 S) {  // rows are queries
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (QUADS) {
    u32 mine = kept_quad(rule, (element + (g + t % 2 * 8) * S) / 4 + t / 2);
    u32 other = __shfl_xor_sync(FULL, mine, 1);
    u32 top = t % 2 ? other : mine, low = t % 2 ? mine : other;
    return (top >> t % 2 * 2 & 3) | (low >> t % 2 * 2 & 3) << 2;
  } else {
    u32 bits = 0;
#pragma unroll 1
    for (int e = 0; e < 4; e++) bits |= kept_one(rule, element + (g + e / 2 * 8) * S + t * 2 + e % 2) << e;
    return bits;
  }
}
__device__ __forceinline__ u32 kept_transposed(const DropoutRule &rule, i64 element, i64 S) {  // columns are queries
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 bits = 0;
  if constexpr (QUADS) {
    int j = g % 4;
    u32 mine = kept_quad(rule, (element + (t * 2 + j % 2) * S) / 4 + g / 4 + j / 2 * 2);
#pragma unroll
    for (int e = 0; e < 4; e++) bits |= (__shfl_sync(FULL, mine, (lane & ~12) | e << 2) >> j & 1) << e;
  } else {
#pragma unroll 1
    for (int e = 0; e < 4; e++) bits |= kept_one(rule, element + (t * 2 + e % 2) * S + g + e / 2 * 8) << e;
  }
  return bits;
}
