// Which keys a query sees, where q, k and v lie, biases by distance: what simt.cu and the mma kernels share.
//                                                                                                 math: README.md §2
// source    own work; buckets after Raffel et al. 2020 (T5)
//
// Defines (op.py): D, THREADS, ROWS (of a block), CAUSAL, WINDOW (0: none), BOUNDS (first_key or last_key are given),
// CROSS (keys and values lie in kv), BUCKETS (rows of rel; 0: no biases).
#pragma once
#include "kernel.cuh"
#if !defined(CAUSAL) || !defined(WINDOW) || !defined(BOUNDS) || !defined(CROSS) || !defined(BUCKETS)
#error "attention/op.py defines what a query sees"
#endif

#define FULL 0xffffffffu
#define RANGES (BOUNDS || WINDOW || (CROSS && CAUSAL))  // else a mask needs nothing but the diagonal, or the end

struct alignas(8) Range { int low, high; };  // low .. high; none if low > high

__device__ __forceinline__ Range either(Range a, Range b) {
  if (a.low > a.high) return b;
  if (b.low > b.high) return a;
  return {min(a.low, b.low), max(a.high, b.high)};
}

// In all threads: the range from the lowest to the highest of theirs.
__device__ __forceinline__ Range warp_range(Range x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1)
    x = either(x, {__shfl_xor_sync(FULL, x.low, lanes), __shfl_xor_sync(FULL, x.high, lanes)});
  return x;
}
__device__ __forceinline__ Range block_range(Range x) {
  __shared__ Range of_warp[THREADS / 32];
  x = warp_range(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) x = either(x, of_warp[w]);
  return x;
}

// Sizes of a call and what its queries see. H, K: heads of a token.
struct View {
  int T, S, H, K;
  const int *first_key, *last_key;  // (B T), or null
  __device__ __forceinline__ View(i64 T_, i64 S_, i64 H_, i64 K_, const int *first, const int *last)
      : T((int)T_), S(CROSS ? (int)S_ : (int)T_), H((int)H_), K((int)K_), first_key(first), last_key(last) {}

  __device__ __forceinline__ i64 q_stride() const { return (i64)(CROSS ? H : H + 2 * K) * D; }
  __device__ __forceinline__ i64 kv_stride() const { return (i64)(CROSS ? 2 * K : H + 2 * K) * D; }
  // Where the first row of a head of sequence b lies: of q and dq in qkv, of k and dk in kv or qkv; v lies K D behind k.
  __device__ __forceinline__ i64 q_start(int b, int h) const { return (i64)b * T * q_stride() + h * D; }
  __device__ __forceinline__ i64 k_start(int b, int h) const {
    return (i64)b * S * kv_stride() + (CROSS ? h : H + h) * D;
  }

  // The keys that query t of sequence b sees; a row past the end sees none, or what the caller ignores.
  __device__ __forceinline__ Range keys(int b, int t) const {
    Range x = {WINDOW ? max(0, t - WINDOW + 1) : 0, CAUSAL ? min(t, S - 1) : S - 1};
    if constexpr (BOUNDS) {
      if (t >= T) return {S, -1};
      if (first_key) x.low = max(x.low, first_key[(i64)b * T + t]);
      if (last_key) x.high = min(x.high, last_key[(i64)b * T + t]);
    }
    return x;
  }
  // The keys that some query of a block of ROWS sees, from row0 on.
  __device__ __forceinline__ Range keys_of_block(int b, int row0) const {
    if constexpr (BOUNDS) {
      Range none = {S, -1};
      return block_range(threadIdx.x < ROWS ? keys(b, row0 + threadIdx.x) : none);
    }
    return {WINDOW ? max(0, row0 - WINDOW + 1) : 0, CAUSAL ? min(S, row0 + ROWS) - 1 : S - 1};
  }
  // The queries that see some key of a block of ROWS, from key row0 on; with bounds, others between them, too.
  __device__ __forceinline__ Range queries_of_block(int b, int row0) const {
    const int last = min(S, row0 + ROWS) - 1;
    Range x = {CAUSAL ? row0 : 0, WINDOW ? min(T, last + WINDOW) - 1 : T - 1};
    if constexpr (!BOUNDS) return x;
    Range seen = {T, -1};
    for (int t = x.low + threadIdx.x; t <= x.high; t += THREADS) {
      Range k = keys(b, t);
      if (max(k.low, row0) <= min(k.high, last)) seen = either(seen, {t, t});
    }
    return block_range(seen);
  }
};

#if BUCKETS
#include "buckets.cuh"
enum { DISTANCES = 2 * FAR + 1 };

// Of a distance key - query.
__device__ __forceinline__ int bucket_of(int d) {
  if (CAUSAL) return distance_bucket(max(-d, 0), BUCKETS);
  return distance_bucket(abs(d), BUCKETS / 2) + (d > 0 ? BUCKETS / 2 : 0);
}
__device__ __forceinline__ int near(int d) { return min(max(d, -FAR), FAR) + FAR; }

struct Biases {  // of a head, in shared memory
  float bias[DISTANCES];
  int bucket[DISTANCES];
  // By all threads; complete after a barrier.
  __device__ __forceinline__ void load(const real *rel, int H, int h) {
    for (int i = threadIdx.x; i < DISTANCES; i += THREADS) {
      bucket[i] = bucket_of(i - FAR);
      bias[i] = to_float(rel[bucket[i] * H + h]);
    }
  }
};

// The gradient of a head's biases: sums by distance, of each warp for itself; far distances in registers.
struct BiasSums {
  float *sums, before, after;  // sums (DISTANCES) of this warp
  __device__ __forceinline__ BiasSums(float *shared)
      : sums(shared + threadIdx.x / 32 * DISTANCES), before(0.0f), after(0.0f) {
    for (int i = threadIdx.x % 32; i < DISTANCES; i += 32) sums[i] = 0.0f;
    __syncwarp();
  }
  // Lanes have different distances.
  __device__ __forceinline__ void add(int d, float x) {
    if (d <= -FAR) before += x;
    else if (d >= FAR) after += x;
    else sums[d + FAR] += x;
    __syncwarp();
  }
  // part (BUCKETS): sums over the warps and the distances of each bucket, in order. Called by all threads.
  __device__ __forceinline__ void store(float *part, const float *shared, const int *bucket) {
    before = warp_reduce(before, Sum());
    after = warp_reduce(after, Sum());
    if (threadIdx.x % 32 == 0) {
      sums[0] = before;
      sums[2 * FAR] = after;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < BUCKETS; r += THREADS) {
      float sum = 0.0f;
      for (int i = 0; i < DISTANCES; i++)
        if (bucket[i] == r)
          for (int w = 0; w < THREADS / 32; w++) sum += shared[w * DISTANCES + i];
      part[r] = sum;
    }
  }
};
#endif
