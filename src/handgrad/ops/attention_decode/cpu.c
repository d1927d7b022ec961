// attention_decode: appends new keys and values to the cache, then attends to its window         math: README.md §2
// forward   writes =  y: (N, H D) dtype;  cache: rows position .. position + T - 1 of each sequence
// numerics  f32 softmax and sums
// layout    T = 1: threads divide (sequence, run of RUN positions) items and read whole cache rows, all heads at once,
//           so they stream memory; then they merge the runs.  T > 1: blocks of queries, as in training
// determinism  runs are fixed and merged in order, for any number of threads
// source    own work; splits over positions like Flash-Decoding (Dao et al. 2023)
#include "../attention/flash.h"

#define RUN 64  // positions of one item: short caches still give all threads work, and merging stays cheap
#define AHEAD 6  // cache rows to prefetch: doubles the bandwidth of one core

// Floats of one run: max (H), sum (H), out (H, D).
static inline int64_t partial_floats(int64_t H, int64_t D) { return round_up(H * (D + 2), 16); }

// The biases of a call's one query, (R, H), and the bucket of each distance up to FAR.
typedef struct {
  const real *rel;  // or NULL
  int bucket[2 * FAR + 1];
} Biases;

// One run of one sequence: the softmax over its n positions alone, before normalisation. distance: of the first one to
// the query, at most 0.
static void decode_run(float *partial, float *score, const real *q, const real *cache, const Biases *biases, int n,
                       int64_t distance, int64_t H, int64_t K, int64_t D, float scale) {
  float *max = partial, *sum = partial + H, *out = partial + 2 * H;
  int64_t row = 2 * K * D, group = H / K;
  for (int s = 0; s < n; s++)
    for (int64_t h = 0; h < H; h++) {
      const real *k = cache + s * row + h / group * D;
      prefetch(k + AHEAD * row, D);
      prefetch(k + AHEAD * row + K * D, D);
      score[h * RUN + s] = dot(q + h * D, k, D) * scale;
    }
  for (int s = 0; biases->rel && s < n; s++) {
    const real *rel = biases->rel + biases->bucket[clamped(distance + s)] * H;
    for (int64_t h = 0; h < H; h++) score[h * RUN + s] += load(rel[h]);
  }
  for (int64_t h = 0; h < H; h++) {
    float *p = score + h * RUN, top = p[0], total = 0.0f;
    for (int s = 1; s < n; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(+ : total)
    for (int s = 0; s < n; s++) {
      p[s] = vexp(p[s] - top);
      total += p[s];
    }
    max[h] = top;
    sum[h] = total;
  }
  for (int64_t h = 0; h < H; h++, out += D) {
    const real *v = cache + (K + h / group) * D;
    const float *p = score + h * RUN;
    int64_t d = 0;
    for (; d + NR <= D; d += NR) {
      vfloat x = {0}, y = {0};
      for (int s = 0; s < n; s++) {
        x += p[s] * widen(v + s * row + d);
        y += p[s] * widen(v + s * row + d + VL);
      }
      *(vfloat *)(out + d) = x;
      *(vfloat *)(out + d + VL) = y;
    }
    for (; d < D; d++) {
      out[d] = 0.0f;
      for (int s = 0; s < n; s++) out[d] += p[s] * load(v[s * row + d]);
    }
  }
}

// y (D) of head h: its runs, rescaled to their common maximum and normalised.
static void decode_merge(real *y, const float *partial, int64_t runs, int64_t h, int64_t H, int64_t D, float *out) {
  int64_t step = partial_floats(H, D);
  float top = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < runs; i++) top = partial[i * step + h] > top ? partial[i * step + h] : top;
  memset(out, 0, (size_t)D * sizeof *out);
  for (int64_t i = 0; i < runs; i++, partial += step) {
    float weight = vexp(partial[h] - top);
    total += weight * partial[H + h];
    for (int64_t d = 0; d < D; d++) out[d] += weight * partial[2 * H + h * D + d];
  }
  for (int64_t d = 0; d < D; d++) y[d] = store(out[d] / total);
}

ENTRY(attention_decode) {
  real *y = a->y;              // (N, H D), N = B T
  real *cache = a->cache;      // (B, S, 2, K, D), in and out
  const real *qkv = a->qkv;    // (N, H + 2 K, D)
  const real *rel = a->rel;    // (R, H), or NULL
  int64_t N = a->N, T = a->T, S = a->S, H = a->H, K = a->K, D = a->D;
  const StepScalars *scalars = a->scalars;
  char *scratch = a->scratch;  // attention_decode_scratch bytes
  int64_t B = N / T, row = (H + 2 * K) * D, kv_row = 2 * K * D, position = scalars->position, sequence = S * kv_row;
  float scale = (float)a->scale;
#pragma omp parallel for schedule(static) if (T > 1)
  for (int64_t i = 0; i < N; i++)
    memcpy(cache + i / T * sequence + (position + i % T) * kv_row, qkv + i * row + H * D,
           (size_t)kv_row * sizeof(real));
  if (T > 1) {
    View view = {.T = T, .S = position + T, .position = position, .window = a->window, .causal = 1};
    Attend x = {.q = qkv, .k = cache, .v = cache + K * D, .q_row = row, .kv_row = kv_row, .q_seq = T * row,
                .kv_seq = sequence, .B = B, .H = H, .K = K, .D = D, .view = view, .scale = scale, .rel = rel, .R = a->R};
    attend(y, NULL, &x, scratch);
    return;
  }
  int64_t low = a->window && position >= a->window ? position + 1 - a->window : 0, first_run = low / RUN;
  int64_t runs = position / RUN + 1 - first_run, step = partial_floats(H, D);
  float *partial = (float *)scratch, *work = partial + B * (S / RUN + 1) * step;
  Biases biases = {.rel = rel};
  if (rel) distance_buckets(biases.bucket, a->R, 1);
#pragma omp parallel
  {
    float *score = work + hg_thread() * (H * RUN + D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * runs; i++) {
      int64_t b = i / runs, run = (first_run + i % runs) * RUN, first = larger(run, low);
      decode_run(partial + i * step, score, qkv + b * row, cache + b * sequence + first * kv_row, &biases,
                 smaller(run + RUN, position + 1) - (int)first, first - position, H, K, D, scale);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * H; i++)
      decode_merge(y + i * D, partial + i / H * runs * step, runs, i % H, H, D, score + H * RUN);
  }
}

SCRATCH(attention_decode)(int64_t N, int64_t T, int64_t S, int64_t H, int64_t D, int64_t threads) {
  if (T > 1) return attend_scratch(T, S, D, threads);
  return 4 * (N * (S / RUN + 1) * partial_floats(H, D) + threads * (H * RUN + D));
}
