// flash: register tiles, packing, and the forward pass over blocks of queries and keys with an online
// softmax. attention/cpu.c and the prefill of attention_decode/cpu.c use it.      math: README.md §2
//
// layout    blocks of BR queries by BC keys; the GEMM of a block is split into MR x NR register tiles
// numerics  sums and softmax in f32; with AVX512-BF16 the operands of GEMMs are bf16, else everything is f32
// source    own work, after Dao et al. 2022 (FlashAttention), algorithm 1, and Rabe & Staats 2021
#pragma once
#include "kernel.h"
#include "philox.h"
#include "vmath.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define VL 16  // floats of a vector
#define LANES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define MR 8
#elif defined(__AVX2__)
#define VL 8
#define LANES {0, 1, 2, 3, 4, 5, 6, 7}
#define MR 4
#else
#define VL 4
#define LANES {0, 1, 2, 3}
#define MR 4
#endif
#define NR (2 * VL)  // MR x NR: 16 (8 without AVX-512) accumulators hide the latency of FMA
#define BR 64        // with BC = 64 and D = 64 all data of a pair of blocks stays in L1 and L2
#define BC 64
#define SLACK 8.0f   // the running maximum moves only if it grows by more: sums can hold e^8, and few blocks rescale

// A lane multiplies units: a float or, for vdpbf16ps, two bf16 neighbours along the summed axis.
#if HG_BF16 && defined(__AVX512BF16__)
#define PAIR 2
typedef bf16 elem;
typedef uint32_t unit __attribute__((may_alias));
#define ELEM(v) (v)
#else
#define PAIR 1
typedef float elem;
typedef float unit;
#define ELEM(v) load(v)
#endif
typedef float vfloat __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vbits __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(2 * VL), aligned(2), may_alias));
#if PAIR == 2
typedef vbits vunit;
#define MAC(c, a, b) ((vfloat)_mm512_dpbf16_ps((__m512)(c), (__m512bh)_mm512_set1_epi32((int)(a)), (__m512bh)(b)))
#else
typedef vfloat vunit;
#define MAC(c, a, b) ((c) + (a) * (b))
#endif

#define INLINE static inline __attribute__((always_inline))  // no call may pass vectors
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int smaller(int64_t x, int64_t y) { return (int)(x < y ? x : y); }
static inline int larger(int64_t x, int64_t y) { return (int)(x > y ? x : y); }
#include "visible.h"
static inline int64_t padded(int64_t D) { return round_up(D, NR); }  // Dp, the columns of every packed buffer

INLINE vfloat vector_max(vfloat x, vfloat y) {
#if VL == 16
  return (vfloat)_mm512_max_ps((__m512)x, (__m512)y);
#elif VL == 8
  return (vfloat)_mm256_max_ps((__m256)x, (__m256)y);
#else
  vbits greater = (vbits)(x > y);
  return (vfloat)(((vbits)x & greater) | ((vbits)y & ~greater));
#endif
}

INLINE vfloat lanes_swapped(vfloat x, uint32_t distance) {
  return SHUFFLE(x, x, (vbits)LANES ^ distance);
}

INLINE float max_of_lanes(vfloat x) {
#pragma GCC unroll 4
  for (uint32_t s = VL / 2; s; s /= 2) x = vector_max(x, lanes_swapped(x, s));
  return x[0];
}

INLINE float sum_of_lanes(vfloat x) {
#pragma GCC unroll 4
  for (uint32_t s = VL / 2; s; s /= 2) x += lanes_swapped(x, s);
  return x[0];
}

INLINE vfloat widen(const real *x) {
#if HG_BF16 && VL == 16
  return (vfloat)((vbits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)) << 16);
#elif HG_BF16 && VL == 8
  return (vfloat)((vbits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)x)) << 16);
#elif HG_BF16
  return (vfloat)(__builtin_convertvector(*(const vhalf *)x, vbits) << 16);
#else
  return *(const vfloat *)x;
#endif
}

static inline float dot(const real *x, const real *y, int64_t n) {
  int64_t whole = n / VL * VL;
  vfloat sum = {0};
  for (int64_t i = 0; i < whole; i += VL) sum += widen(x + i) * widen(y + i);
  float total = sum_of_lanes(sum);
  for (int64_t i = whole; i < n; i++) total += load(x[i]) * load(y[i]);
  return total;
}

// c (MR, NR) = or += a (MR, k) b (k, NR); k counts units. a is read by the strides a_row and a_k, in either order.
INLINE void tile(float *c, int64_t c_row, const unit *a, int64_t a_row, int64_t a_k, const unit *b, int64_t b_k, int k,
                 int add) {
  vfloat x[MR], y[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    x[i] = add ? *(vfloat *)(c + i * c_row) : (vfloat){0};
    y[i] = add ? *(vfloat *)(c + i * c_row + VL) : (vfloat){0};
  }
  for (int u = 0; u < k; u++, a += a_k, b += b_k) {
    vunit b0 = *(const vunit *)b, b1 = *(const vunit *)(b + VL);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      x[i] = MAC(x[i], a[i * a_row], b0);
      y[i] = MAC(y[i], a[i * a_row], b1);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    *(vfloat *)(c + i * c_row) = x[i];
    *(vfloat *)(c + i * c_row + VL) = y[i];
  }
}

// s (n, BC) = a (n, D) t (D, keys). Tiles that no query sees are skipped.
static void block_scores(float *s, const elem *a, const unit *t, int n, const Seen *seen, int64_t D) {
  int64_t Dp = padded(D);
  int k = (int)((D + PAIR - 1) / PAIR);
  for (int c = 0; c < BC; c += NR, t += NR * Dp / PAIR)
    for (int r = 0; r < n; r += MR)
      if (c < seen->end[r / MR] && c + NR > seen->begin[r / MR])
        tile(s + r * BC + c, BC, (const unit *)(a + r * Dp), Dp / PAIR, 1, t, NR, k, 0);
}

// o (n, Dp) = or += p (n, BC) v (BC, Dp), over visible keys only
static void block_pv_gemm(float *o, const elem *p, const unit *v, int n, const Seen *seen, int64_t Dp, int add) {
  for (int c = 0; c < Dp; c += NR)
    for (int r = 0; r < n; r += MR) {
      int start = seen->begin[r / MR] / PAIR, k = (seen->end[r / MR] + PAIR - 1) / PAIR - start;
      if (k > 0 || !add)
        tile(o + r * Dp + c, Dp, (const unit *)(p + r * BC) + start, BC / PAIR, 1, v + start * Dp + c, Dp, k, add);
    }
}

// Prefetches n elements that the hardware prefetcher does not predict; past the end of an array this is harmless.
static inline void prefetch(const real *next, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(real)) __builtin_prefetch(next + i, 0, 2);
}

// rows (padded_n, Dp) = src (n, D), padded with zeros
static void pack_rows(elem *rows, const real *src, int64_t src_row, int n, int padded_n, int64_t D) {
  int64_t Dp = padded(D);
  for (int r = 0; r < padded_n; r++, rows += Dp, src += src_row) {
    int64_t filled = r < n ? D : 0;
    prefetch(src + D, filled);  // the next head is contiguous with this one, but rows are far apart
    for (int64_t d = 0; d < filled; d++) rows[d] = ELEM(src[d]);
    for (int64_t d = filled; d < Dp; d++) rows[d] = 0;
  }
}

// pairs (n / PAIR, Dp) units = rows (n, Dp): neighbouring rows share a unit, for the B operand of a GEMM over rows.
static void pack_pairs(unit *pairs, const elem *rows, int n, int64_t Dp) {
#if PAIR == 2
  for (int r = 0; r < n; r += 2, rows += 2 * Dp, pairs += Dp)
#pragma omp simd
    for (int64_t d = 0; d < Dp; d++) pairs[d] = (uint32_t)rows[d] | (uint32_t)rows[Dp + d] << 16;
#else
  if (pairs != rows) memcpy(pairs, rows, (size_t)(n * Dp) * sizeof *rows);
#endif
}

// Transposes (VL, VL) units: step s swaps the two off-diagonal s x s quadrants of every 2s x 2s square.
static inline void transpose(unit *to, const unit *from, int64_t from_row) {
  vbits v[VL], lane = LANES;
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) v[i] = *(const vbits *)(from + i * from_row);
#pragma GCC unroll 4
  for (int s = 1; s < VL; s *= 2) {
    vbits low = lane + ((vbits)((lane & (uint32_t)s) != 0) & (uint32_t)(VL - s)), high = low + (uint32_t)s;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
      if (!(i & s)) {
        vbits x = v[i], y = v[i + s];
        v[i] = SHUFFLE(x, y, low);
        v[i + s] = SHUFFLE(x, y, high);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) *(vbits *)(to + i * NR) = v[i];
}

// panels (BC / NR) of (Dp / PAIR, NR) units = rows (BC, Dp) transposed, for the B operand of a GEMM over D.
static void pack_transposed(unit *panels, const elem *rows, int64_t Dp) {
  for (int c = 0; c < BC; c += VL)
    for (int64_t u = 0; u < Dp / PAIR; u += VL)
      transpose(panels + (int64_t)(c / NR) * NR * Dp / PAIR + u * NR + c % NR, (const unit *)(rows + c * Dp) + u,
                Dp / PAIR);
}

// s (n, BC), a block of floats, as the A operand of a GEMM: converted into `rows` for vdpbf16ps, else s itself.
static inline const elem *as_rows(elem *rows, const float *s, int n) {
#if PAIR == 2
  for (int i = 0; i < n * BC; i += 32)
    _mm512_storeu_si512(rows + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(s + i + 16), _mm512_loadu_ps(s + i)));
  return rows;
#else
  (void)rows, (void)n;
  return s;
#endif
}

// Operands of a forward pass: T queries of each sequence and its S keys. Query head h reads key/value head h / (H / K).
typedef struct {
  const real *q, *k, *v;
  int64_t q_row, kv_row;  // elements from one token to the next; the heads of a token are contiguous
  int64_t q_seq, kv_seq;  // elements from one sequence to the next
  int64_t B, H, K, D;
  View view;
  float scale;            // of q k'
  const real *rel;        // (R, H) biases by bucket of the distance, or NULL
  int64_t R;
  DropoutRule drop;       // threshold 0: none
} Attend;

typedef struct {
  elem *q, *p, *rows;  // (BR, Dp); (BR, BC); (BC, Dp), a buffer for packing
  unit *k, *v;         // transposed panels; pairs: all keys of one head
  float *s, *o;        // (BR, BC) scores, then probabilities; (BR, Dp) before normalisation
  float *bias;         // (T + S) of one head, by key - query + T - 1; NULL without rel
} AttendScratch;

static inline void *take(uintptr_t *at, int64_t bytes) {
  void *p = (void *)*at;
  *at += (uintptr_t)round_up(bytes, 64);
  return p;
}

// Places the buffers from address `at` on; returns the address after them: their size, if `at` is 0.
static inline uintptr_t attend_layout(AttendScratch *w, uintptr_t at, int64_t T, int64_t S, int64_t D) {
  int64_t Dp = padded(D), item = (int64_t)sizeof(elem);
  w->q = take(&at, BR * Dp * item);
  w->p = take(&at, PAIR == 2 ? BR * BC * item : 0);
  w->rows = take(&at, BC * Dp * item);
  w->k = take(&at, round_up(S, BC) * Dp * item);
  w->v = take(&at, round_up(S, BC) * Dp * item);
  w->s = take(&at, BR * BC * 4);
  w->o = take(&at, BR * Dp * 4);
  w->bias = take(&at, (T + S) * 4);
  return at;
}

static inline int64_t attend_scratch(int64_t T, int64_t S, int64_t D, int64_t threads) {
  AttendScratch w;
  return threads * (int64_t)attend_layout(&w, 0, T, S, D);
}

// bias (T + S - 1) of head h, by key - query + T - 1, queries counted from 0. bucket: of distance_buckets.
static void head_bias(float *bias, const Attend *x, const int *bucket, int64_t h) {
  int64_t T = x->view.T, S = x->view.S, first = 1 - T - x->view.position;  // the smallest distance
  for (int64_t i = 0; i < T + S - 1; i++) bias[i] = load(x->rel[bucket[clamped(i + first)] * x->H + h]);
}

static void scale_and_bias(float *s, const float *bias, int begin, int end, float scale) {
  for (int c = begin; c < end; c++) s[c] = s[c] * scale + bias[c];
}

// y (n, H D) and lse (n, or NULL) of n <= BR queries of one head. Query r sees keys from[r] .. to[r] - 1. row: of the
// first query in its sequence.
static void attend_rows(real *y, float *lse, const Attend *x, const AttendScratch *w, const real *q, int n,
                        int64_t row, const int32_t *from, const int32_t *to, RowsSee see, int64_t element) {
  int64_t D = x->D, Dp = padded(D), T = x->view.T, S = x->view.S, begin = see.any.begin / BC * BC;
  float scale = x->rel ? 1.0f : x->scale, max[BR], factor[BC];
  vfloat sum[BR];  // by lanes
  Seen all, part;
  seen_all(&all);
  pack_rows(w->q, q, x->q_row, n, (int)round_up(n, MR), D);
  for (int r = 0; r < n; r++) {
    max[r] = -INFINITY;
    sum[r] = (vfloat){0};
  }
  for (int64_t key = begin; key < see.any.end; key += BC) {
    float top[BR];
    int low[BR], width[BR];
    const Seen *seen = seen_columns(&part, &all, see, from, to, key, n);
    block_scores(w->s, w->q, w->k + key * Dp / PAIR, n, seen, D);
    for (int r = 0; r < n; r++) {
      float *s = w->s + r * BC;
      vfloat tops = (vfloat){0} - INFINITY;
      low[r] = seen->begin[r / MR] / VL * VL;
      width[r] = (int)round_up(seen->end[r / MR], VL);
      if (x->rel) scale_and_bias(s, w->bias + key - row - r + T - 1, low[r], seen->end[r / MR], x->scale);
      for (int c = low[r]; c < smaller(seen->from[r], width[r]); c++) s[c] = -INFINITY;
      for (int c = larger(seen->to[r], low[r]); c < width[r]; c++) s[c] = -INFINITY;
      for (int c = low[r]; c < width[r]; c += VL) tops = vector_max(*(vfloat *)(s + c), tops);
      top[r] = max_of_lanes(tops) * scale;
    }
    for (int r = 0; r < n; r++)
      if (top[r] > max[r] + SLACK) {
        float shrink = vexp(max[r] - top[r]);
        max[r] = top[r];
        sum[r] *= shrink;
        if (key > begin)
          for (int64_t d = 0; d < Dp; d++) w->o[r * Dp + d] *= shrink;
      }
    for (int r = 0; r < n; r++) {
      float *s = w->s + r * BC, base = max[r] > -INFINITY ? max[r] : 0.0f;  // no key so far
      for (int c = low[r]; c < width[r]; c += VL) {
#pragma GCC unroll 1  // not unrolled, it compiles to one vector
        for (int l = c; l < c + VL; l++) s[l] = vexp(s[l] * scale - base);
        sum[r] += *(vfloat *)(s + c);
      }
    }
    if (x->drop.threshold)
      for (int r = 0; r < n; r++) {
        dropout_factors(factor, element + r * S + key, width[r], x->drop);
        for (int c = low[r]; c < width[r]; c++) w->s[r * BC + c] *= factor[c];
      }
    block_pv_gemm(w->o, as_rows(w->p, w->s, n), w->v + key / PAIR * Dp, n, seen, Dp, key > begin);
  }
  for (int r = 0; r < n; r++) {
    float total = sum_of_lanes(sum[r]);
    int sees = total > 0.0f;
    for (int64_t d = 0; d < D; d++) y[r * x->H * D + d] = store(sees ? w->o[r * Dp + d] / total : 0.0f);
    if (lse) lse[r] = sees ? max[r] + logf(total) : 0.0f;
  }
}

// Packs the keys and values of a head from block `range.begin` on; `packed` is what is there already.
static void pack_head(Range *packed, const AttendScratch *w, const Attend *x, const real *k, const real *v,
                      Range range) {
  int64_t S = x->view.S, D = x->D, Dp = padded(D), begin = range.begin / BC * BC;
  if (begin < packed->begin || begin > packed->end) *packed = (Range){begin, begin};
  for (int64_t key = packed->end; key < range.end; key += BC) {
    int filled = smaller(BC, S - key);
    pack_rows(w->rows, k + key * x->kv_row, x->kv_row, filled, BC, D);
    pack_transposed(w->k + key * Dp / PAIR, w->rows, Dp);
    pack_rows(w->rows, v + key * x->kv_row, x->kv_row, filled, BC, D);
    pack_pairs(w->v + key / PAIR * Dp, w->rows, BC, Dp);
    packed->end = key + BC;
  }
}

// cost (blocks): the pairs of blocks of each row block of sequence b. Returns their sum.
static int64_t row_costs(int *cost, const View *v, int64_t b) {
  int32_t from[BR], to[BR];
  int64_t total = 0;
  for (int64_t row = 0; row < v->T; row += BR) {
    Range r = rows_see(from, to, v, b * v->T + row, smaller(BR, v->T - row)).any;
    cost[row / BR] = r.begin < r.end ? (int)((r.end - 1) / BC - r.begin / BC + 1) : 1;
    total += cost[row / BR];
  }
  return total;
}

// y (B T, H D); lse (B, H, T) or NULL. Each thread computes consecutive (head, row block) items of equal total cost and
// packs the keys that its queries see. The arithmetic of an item does not depend on the thread.
static void attend(real *y, float *lse, const Attend *x, char *scratch) {
  int64_t T = x->view.T, S = x->view.S, D = x->D, blocks = (T + BR - 1) / BR;
#pragma omp parallel
  {
    int cost[blocks], bucket[2 * FAR + 1];
    int32_t from[BR], to[BR];
    int64_t sum = 0, at = 0;
    for (int64_t b = 0; b < x->B; b++) sum += row_costs(cost, &x->view, b) * x->H;
    int64_t start = sum * hg_thread() / hg_num_threads(), stop = sum * (hg_thread() + 1) / hg_num_threads();
    AttendScratch w;
    attend_layout(&w, (uintptr_t)scratch + (uintptr_t)(hg_thread() * attend_scratch(T, S, D, 1)), T, S, D);
    if (x->rel) distance_buckets(bucket, x->R, x->view.causal);
    for (int64_t head = 0; head < x->B * x->H; head++) {
      int64_t b = head / x->H, h = head % x->H, kv = b * x->kv_seq + h / (x->H / x->K) * D, biased = 0;
      Range packed = {0, 0};
      if (h == 0) row_costs(cost, &x->view, b);
      for (int64_t i = 0; i < blocks; i++) {
        int64_t row = i * BR;
        int mine = start <= at && at < stop, n = smaller(BR, T - row);
        at += cost[i];
        if (!mine) continue;
        RowsSee see = rows_see(from, to, &x->view, b * T + row, n);
        pack_head(&packed, &w, x, x->k + kv, x->v + kv, see.any);
        if (x->rel && !biased++) head_bias(w.bias, x, bucket, h);
        attend_rows(y + ((b * T + row) * x->H + h) * D, lse ? lse + head * T + row : NULL, x, &w,
                    x->q + b * x->q_seq + row * x->q_row + h * D, n, row, from, to, see, (head * T + row) * S);
      }
    }
  }
}
