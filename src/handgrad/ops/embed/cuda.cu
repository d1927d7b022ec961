// embed: y = scale wte[id] + wpe[position]                                                       math: README.md §2, §3
// forward   writes =  y: (N, C) dtype
// backward  writes = or += dwte: (V, C) grad_t, dwpe: (Tmax, C) grad_t; what no row reaches is zero when =
// numerics  one rounding forward; gradients summed in f32 in row order, and rounded once
// layout    forward: a thread makes one 16-byte access. backward: rows are sorted by token; a block sums SEGMENT sorted
//           rows, however many a token has; tokens that span blocks are merged at the end. Given positions are tokens of
//           dwpe: the same kernels sum it
// determinism  fixed order; no atomics
// speed     H100 80GB, GPT-2 124M, N=65536 C=768 bf16, in a traced step, 2026-11-24: forward 0.08 ms, backward 0.22 ms
// source    own work
#include "kernel.cuh"

// -DCOLUMNS   C
// -DVEC       elements of one access: 16 bytes of them where C is a multiple, else 1
// -DTHREADS   of a block
// -DSCALE     factor of the rows of the table: of wte, or 1
#if !defined(COLUMNS) || !defined(VEC) || !defined(THREADS) || !defined(FORWARD) || !defined(SCALE)
#error "embed/op.py defines these"
#endif
constexpr int C = COLUMNS;
constexpr float scale = (float)SCALE;
typedef Pack<real, VEC> Pk;

#if FORWARD
KERNEL __launch_bounds__(THREADS)
embed_forward_kernel(real *__restrict__ y,               // (N, C)
                     const int *__restrict__ ids,        // (N), each < V
                     const real *__restrict__ wte,       // (V, C)
                     const real *__restrict__ wpe,       // (Tmax, C) or NULL
                     const int *__restrict__ positions,  // (N), each < Tmax, or NULL
                     const StepScalars *scalars, i64 N, i64 T, i64 decode) {
  i64 at = (i64)blockIdx.x * THREADS + threadIdx.x, n = at / (C / VEC);
  if (n >= N) return;
  int c = (int)(at % (C / VEC)) * VEC;
  Pk x = load<real, VEC>(wte + (i64)ids[n] * C + c);
  if (wpe) {
    i64 position = (u32)n % (u32)T + (decode ? scalars->position : 0);  // in decode rows continue what is in the cache
    Pk place = load<real, VEC>(wpe + (positions ? positions[n] : position) * C + c);
#pragma unroll
    for (int i = 0; i < VEC; i++) x.set(i, scale * x.at(i) + place.at(i));
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) x.set(i, scale * x.at(i));
  }
  store(y + n * C + c, x);
}
#else
// -DROWS         N
// -DSUM_THREADS  of a block that sums, at least 64; each makes one access to a row
// -DCHUNK        keys that a block sorts, two a thread: a power of two
// -DSEGMENT      sorted rows that a block sums
#if !defined(ROWS) || !defined(SUM_THREADS) || !defined(CHUNK) || !defined(SEGMENT)
#error "embed/op.py defines these"
#endif
constexpr i64 N = ROWS, CHUNKS = (N + CHUNK - 1) / CHUNK;
constexpr int AHEAD = 8;  // rows that a thread reads before it adds them

// A key is a token and its row. Keys are unique, so their order is too.
__device__ __forceinline__ i64 token_of(u64 key) { return (i64)(key >> 32); }
__device__ __forceinline__ i64 row_of(u64 key) { return (i64)(u32)key; }

// dwte = 0, in the first micro-batch of a step
KERNEL embed_zero_kernel(grad_t *__restrict__ dwte,  // (V, C)
                         i64 V, i64 accumulate) {
  if (accumulate) return;
  constexpr int n = VEC == 1 ? 1 : 16 / sizeof(grad_t);
  const Pack<grad_t, n> zero = {};
  for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * n; i < V * C; i += (i64)gridDim.x * blockDim.x * n)
    store(dwte + i, zero);
}

// Bitonic sort of each chunk of rows by key; the last chunk is padded with the largest key.
KERNEL __launch_bounds__(CHUNK / 2)
embed_sort_kernel(u64 *__restrict__ chunks,      // (CHUNKS, CHUNK)
                  const int *__restrict__ ids) {  // (N)
  __shared__ u64 keys[CHUNK];
  i64 first = (i64)blockIdx.x * CHUNK;
  for (int i = threadIdx.x; i < CHUNK; i += CHUNK / 2)
    keys[i] = first + i < N ? (u64)ids[first + i] << 32 | (u64)(first + i) : ~0ull;
  for (int size = 2; size <= CHUNK; size *= 2)
    for (int stride = size / 2; stride; stride /= 2) {
      __syncthreads();
      int i = 2 * threadIdx.x - (threadIdx.x & (stride - 1));  // the lower of a pair `stride` apart
      u64 a = keys[i], b = keys[i + stride];
      if ((a > b) == !(i & size)) {
        keys[i] = b;
        keys[i + stride] = a;
      }
    }
  __syncthreads();
  for (int i = threadIdx.x; i < CHUNK; i += CHUNK / 2) chunks[first + i] = keys[i];
}

// Merges the chunks: the rank of a key is the number of smaller keys in each chunk, found by binary search.
KERNEL embed_merge_kernel(u64 *__restrict__ sorted,          // (N)
                          const u64 *__restrict__ chunks) {  // (CHUNKS, CHUNK)
  u64 key = chunks[(i64)blockIdx.x * blockDim.x + threadIdx.x];
  i64 place = 0;
#pragma unroll 4
  for (i64 k = 0; k < CHUNKS; k++) {
    const u64 *chunk = chunks + k * CHUNK;
    int below = 0;
#pragma unroll
    for (int half = CHUNK / 2; half; half /= 2) below += chunk[below + half - 1] < key ? half : 0;
    place += below + (chunk[below] < key);
  }
  if (place < N) sorted[place] = key;  // the others pad the last chunk
}

// to = or += scale sum
__device__ __forceinline__ void put(grad_t *to, const Pack<float, VEC> &sum, bool add) {
  Pack<grad_t, VEC> x = {};
  if (add) x = load<grad_t, VEC>(to);
#pragma unroll
  for (int i = 0; i < VEC; i++) x.set(i, add ? x.at(i) + scale * sum.v[i] : scale * sum.v[i]);
  store(to, x);
}

// One segment of the sorted rows. Tokens whose rows all lie inside are written. The sums of a token that began earlier
// (head) and of one that goes on (tail) go to partial (segments, 2, C). A segment of one such token is all head.
KERNEL __launch_bounds__(SUM_THREADS)
embed_backward_kernel(grad_t *__restrict__ dwte,         // (V, C)
                      float *__restrict__ partial,       // (segments, 2, C)
                      const real *__restrict__ dy,       // (N, C)
                      const u64 *__restrict__ sorted,    // (N)
                      i64 accumulate) {
  __shared__ u64 keys[SEGMENT + 2];  // and the neighbours: no token where there is none
  i64 first = (i64)blockIdx.x * SEGMENT;
  int rows = N - first < SEGMENT ? (int)(N - first) : SEGMENT, c = (blockIdx.y * SUM_THREADS + threadIdx.x) * VEC;
  if (threadIdx.x < SEGMENT + 2) {
    i64 at = first + threadIdx.x - 1;
    keys[threadIdx.x] = at >= 0 && at < N ? sorted[at] : ~0ull;
  }
  __syncthreads();
  if (c >= C) return;
  const bool add = accumulate;
  const u64 *own = keys + 1;
  Pack<float, VEC> sum = {};
  for (int base = 0; base < rows; base += AHEAD) {
    Pk g[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (base + j < rows) g[j] = load_streaming<real, VEC>(dy + row_of(own[base + j]) * C + c);
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      int k = base + j;
      if (k >= rows) break;
      i64 token = token_of(own[k]);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum.v[i] += g[j].at(i);
      bool goes_on = token_of(own[k + 1]) == token;
      if (goes_on && k + 1 < rows) continue;
      bool head = token_of(own[-1]) == token;  // equal tokens are neighbours: all from the start on are this one
      if (head || goes_on) store(partial + ((i64)blockIdx.x * 2 + !head) * C + c, sum);
      else put(dwte + token * C + c, sum, add);
      sum = {};
    }
  }
}

// A token that begins in this block's segment and goes on: its tail, then the heads of the segments after it.
KERNEL __launch_bounds__(SUM_THREADS)
embed_across_kernel(grad_t *__restrict__ dwte,          // (V, C)
                    const float *__restrict__ partial,  // (segments, 2, C)
                    const u64 *__restrict__ sorted,     // (N)
                    i64 accumulate) {
  i64 segment = blockIdx.x, after = (segment + 1) * SEGMENT;
  int c = (blockIdx.y * SUM_THREADS + threadIdx.x) * VEC;
  if (after >= N || c >= C) return;
  i64 token = token_of(sorted[after]);
  if (token_of(sorted[after - 1]) != token) return;  // the last token ends here
  i64 before = segment * SEGMENT - 1;
  if (before >= 0 && token_of(sorted[before]) == token) return;  // it began earlier
  i64 low = after, high = N;  // its last row is low
  while (high - low > 1) {
    i64 middle = (low + high) / 2;
    if (token_of(sorted[middle]) == token) low = middle;
    else high = middle;
  }
  Pack<float, VEC> sum = load<float, VEC>(partial + (segment * 2 + 1) * C + c), head[AHEAD];
  for (i64 k = segment + 1; k <= low / SEGMENT; k += AHEAD) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (k + j <= low / SEGMENT) head[j] = load<float, VEC>(partial + (k + j) * 2 * C + c);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (k + j <= low / SEGMENT)
#pragma unroll
        for (int i = 0; i < VEC; i++) sum.v[i] += head[j].v[i];
  }
  put(dwte + token * C + c, sum, accumulate);
}

// dwpe: the sum over the sequences, for each position; positions past T get none.
KERNEL __launch_bounds__(THREADS)
embed_position_kernel(grad_t *__restrict__ dwpe,    // (Tmax, C)
                      const real *__restrict__ dy,  // (N, C)
                      i64 T, i64 Tmax, i64 accumulate) {
  i64 at = (i64)blockIdx.x * THREADS + threadIdx.x, t = at / (C / VEC);
  const bool add = accumulate;
  if (t >= (add ? T : Tmax)) return;
  int c = (int)(at % (C / VEC)) * VEC;
  Pack<float, VEC> sum = {};
  Pk g[AHEAD];
  for (i64 n = t; t < T && n < N; n += AHEAD * T) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (n + j * T < N) g[j] = load<real, VEC>(dy + (n + j * T) * C + c);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (n + j * T < N)
#pragma unroll
        for (int i = 0; i < VEC; i++) sum.v[i] += g[j].at(i);
  }
  put(dwpe + t * C + c, sum, add);
}
#endif
