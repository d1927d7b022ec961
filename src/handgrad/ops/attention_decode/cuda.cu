// attention_decode: append the new keys and values to the cache, then attend to its window       math: README.md §2, §7
// forward   writes =  y: (N, H D) dtype;  cache: rows position .. position + T - 1 of each sequence
// numerics  scores, softmax and sums in f32
// layout    a block computes one query head of one token over one chunk of the keys that it sees. LANES lanes share a
//           key and read it in 16-byte words, so a warp has 32 / LANES keys at a time, four steps in flight; then lane
//           groups, warps and chunks are merged
// determinism  the chunks depend on the number of keys alone; everything is merged in order
// speed     H100 80GB, bf16, bench/gpu_ops.py, 2026-11-24: 64 full caches 2.38 TB/s (80 % of the copy rate),
//           one cache 0.44 TB/s
// source    own work; the split over positions is Flash-Decoding's (Dao et al. 2023)
//
// Defines (op.py): D, VEC (elements of an access), LANES, PARTS (chunks of the keys), THREADS, BUCKETS (rows of rel; 0:
// no biases).
#include "buckets.cuh"
#if !defined(D) || !defined(VEC) || !defined(LANES) || !defined(PARTS) || !defined(THREADS) || !defined(BUCKETS)
#error "attention_decode/op.py defines these"
#endif

#define WARPS (THREADS / 32)
#define PER ((D + LANES * VEC - 1) / (LANES * VEC))  // accesses of a lane to one key
#define AHEAD 4                                      // keys of a lane group that are read before the first is used
#define FULL 0xffffffffu

struct Biases {  // of a head, in shared memory, by the distance of a key before its query
  float values[BUCKETS ? FAR + 1 : 1];
  __device__ __forceinline__ void load(const real *rel, i64 H, i64 h) {
#if BUCKETS
    for (int d = threadIdx.x; d <= FAR; d += THREADS) values[d] = to_float(rel[distance_bucket(d, BUCKETS) * H + h]);
    __syncthreads();
#endif
  }
  __device__ __forceinline__ float of(i64 distance) const {
    return BUCKETS ? values[distance < FAR ? distance : FAR] : 0.0f;
  }
};

// The weight of a sum with maximum m, once the maximum is top; 0 for an empty sum.
__device__ __forceinline__ float weight(float m, float top) { return m == -HG_INF ? 0.0f : expf(m - top); }

// Merges a block's lane groups, then its warps: y (D), or where PARTS > 1 the chunk's sum, maximum and total weight.
// o, top, total: the lane's elements of its group's weighted sum of values, the maximum score, the sum of weights.
__device__ __forceinline__ void merge_block(real *y, float *part, float (&o)[PER][VEC], float top, float total) {
  __shared__ float tops[WARPS], totals[WARPS], sums[WARPS][D];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane % LANES * VEC;
  const float warp_top = warp_reduce(top, Max()), mine = weight(top, warp_top);
  total *= mine;
#pragma unroll
  for (int lanes = LANES; lanes < 32; lanes *= 2) total += __shfl_xor_sync(FULL, total, lanes);
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      o[i][e] *= mine;
#pragma unroll
      for (int lanes = LANES; lanes < 32; lanes *= 2) o[i][e] += __shfl_xor_sync(FULL, o[i][e], lanes);
      int d = i * LANES * VEC + own + e;
      if (lane < LANES && d < D) sums[warp][d] = o[i][e];
    }
  if (lane == 0) {
    tops[warp] = warp_top;
    totals[warp] = total;
  }
  __syncthreads();
  float block_top = tops[0], block_total = 0.0f, weights[WARPS];
#pragma unroll
  for (int w = 1; w < WARPS; w++) block_top = fmaxf(block_top, tops[w]);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    weights[w] = weight(tops[w], block_top);
    block_total += weights[w] * totals[w];
  }
  for (int d = threadIdx.x; d < D; d += THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += weights[w] * sums[w][d];
    if (PARTS == 1) y[d] = from_float<real>(sum / block_total);
    else part[d] = sum;
  }
  if (PARTS > 1 && threadIdx.x == 0) {
    part[D] = block_top;
    part[D + 1] = block_total;
  }
}

KERNEL __launch_bounds__(THREADS, 4) attention_decode_kernel(
    real *y,            // (N, H D), where PARTS is 1
    float *parts,       // (N, H, PARTS, D + 2): sums over values, maximum, sum of weights
    real *cache,        // (B, S, 2, K, D), in and out
    const real *qkv,    // (N, H + 2 K, D)
    const real *rel,    // (R, H)
    const StepScalars *scalars, i64 T, i64 S, i64 H, i64 K, i64 window, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane % LANES * VEC;
  const i64 n = blockIdx.x / H, h = blockIdx.x % H, kv = h / (H / K), b = n / T, t = n % T;
  const i64 position = scalars->position, row = (H + 2 * K) * D, end = position + t + 1;
  const i64 low = window && end > window ? end - window : 0, seen = end - low;
  const i64 first = low + seen * blockIdx.y / PARTS, last = low + seen * (blockIdx.y + 1) / PARTS;
  const real *fresh = qkv + (b * T - position) * row + (H + kv) * D;  // key s of position and later, s rows from here
  real *cached = cache + b * S * 2 * K * D + kv * D;

  if (blockIdx.y == 0 && h % (H / K) == 0)  // this block appends its key and value; no block reads them from the cache
    for (int d = threadIdx.x; d < D; d += THREADS) {
      real *to = cached + (position + t) * 2 * K * D + d;
      const real *from = fresh + (position + t) * row + d;
      to[0] = from[0];
      to[K * D] = from[K * D];
    }

  __shared__ Biases biases;
  biases.load(rel, H, h);
  float q[PER][VEC], o[PER][VEC], top = -HG_INF, total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int d = i * LANES * VEC + own;
    Pack<real, VEC> x;
    if (d < D) x = load<real, VEC>(qkv + n * row + h * D + d);
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      q[i][e] = d < D ? x.at(e) * scale : 0.0f;
      o[i][e] = 0.0f;
    }
  }

  constexpr int step = THREADS / LANES;  // keys that the block's lane groups take at a time
  for (i64 s0 = first + warp * (32 / LANES); s0 < last; s0 += step * AHEAD) {
    Pack<real, VEC> k[AHEAD][PER], v[AHEAD][PER];
    float z[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      i64 s = min(s0 + a * step + lane / LANES, last - 1);
      const real *at = s < position ? cached + s * 2 * K * D : fresh + s * row;
#pragma unroll
      for (int i = 0; i < PER; i++) {
        int d = i * LANES * VEC + own;
        if (d < D) {
          k[a][i] = load<real, VEC>(at + d);
          v[a][i] = load<real, VEC>(at + K * D + d);
        }
      }
    }
    float higher = top;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      z[a] = 0.0f;
#pragma unroll
      for (int i = 0; i < PER; i++)
#pragma unroll
        for (int e = 0; e < VEC; e++)
          if (i * LANES * VEC + own < D) z[a] += q[i][e] * k[a][i].at(e);
#pragma unroll
      for (int lanes = LANES / 2; lanes; lanes /= 2) z[a] += __shfl_xor_sync(FULL, z[a], lanes);
      const i64 s = s0 + a * step + lane / LANES;
      z[a] = s < last ? z[a] + biases.of(end - 1 - s) : -HG_INF;
      higher = fmaxf(higher, z[a]);
    }
    float shrink = weight(top, higher);
    top = higher;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
      for (int e = 0; e < VEC; e++) o[i][e] *= shrink;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      float p = weight(z[a], top);
      total += p;
#pragma unroll
      for (int i = 0; i < PER; i++)
#pragma unroll
        for (int e = 0; e < VEC; e++)
          if (i * LANES * VEC + own < D) o[i][e] += p * v[a][i].at(e);
    }
  }
  merge_block(y + (n * H + h) * D, parts + ((i64)blockIdx.x * PARTS + blockIdx.y) * (D + 2), o, top, total);
}

KERNEL __launch_bounds__(THREADS) attention_decode_merge_kernel(
    real *y,               // (N, H D)
    const float *parts) {  // (N, H, PARTS, D + 2)
  parts += (i64)blockIdx.x * PARTS * (D + 2);
  float top = -HG_INF, total = 0.0f;
  for (int i = 0; i < PARTS; i++) top = fmaxf(top, parts[i * (D + 2) + D]);
  for (int i = 0; i < PARTS; i++) total += weight(parts[i * (D + 2) + D], top) * parts[i * (D + 2) + D + 1];
  for (int d = threadIdx.x; d < D; d += THREADS) {
    float sum = 0.0f;
    for (int i = 0; i < PARTS; i++) sum += weight(parts[i * (D + 2) + D], top) * parts[i * (D + 2) + d];
    y[(i64)blockIdx.x * D + d] = from_float<real>(sum / total);
  }
}
