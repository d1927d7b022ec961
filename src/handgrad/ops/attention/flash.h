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

// s (n, BC) = a (n, D) t (D, keys). Query r sees keys <= r + shift of the block; tiles that no query sees are skipped.
static void block_scores(float *s, const elem *a, const unit *t, int n, int64_t shift, int64_t D) {
  int64_t Dp = padded(D);
  int k = (int)((D + PAIR - 1) / PAIR);
  for (int c = 0; c < BC; c += NR, t += NR * Dp / PAIR)
    for (int r = larger(0, c - shift) / MR * MR; r < n; r += MR)
      tile(s + r * BC + c, BC, (const unit *)(a + r * Dp), Dp / PAIR, 1, t, NR, k, 0);
}

// o (n, Dp) = or += p (n, BC) v (BC, Dp), over visible keys only
static void block_pv_gemm(float *o, const elem *p, const unit *v, int n, int64_t shift, int64_t Dp, int add) {
  for (int c = 0; c < Dp; c += NR)
    for (int r = 0; r < n; r += MR) {
      int k = smaller(BC, r + MR + shift);
      if (k > 0 || !add)
        tile(o + r * Dp + c, Dp, (const unit *)(p + r * BC), BC / PAIR, 1, v + c, Dp, (k + PAIR - 1) / PAIR, add);
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

// Operands of a forward pass: T queries of each sequence from `position` on, and all keys up to the last query. Query
// head h reads key/value head h / (H / K).
typedef struct {
  const real *q, *k, *v;
  int64_t q_row, kv_row;  // elements from one token to the next; the heads of a token are contiguous
  int64_t q_seq, kv_seq;  // elements from one sequence to the next
  int64_t B, T, position, H, K, D;
  int causal;             // 0: every query sees all keys
  DropoutRule drop;       // threshold 0: none
} Attend;

typedef struct {
  elem *q, *p, *rows;  // (BR, Dp); (BR, BC); (BC, Dp), a buffer for packing
  unit *k, *v;         // transposed panels; pairs: all keys of one head
  float *s, *o;        // (BR, BC) scores, then probabilities; (BR, Dp) before normalisation
} AttendScratch;

static inline void *take(uintptr_t *at, int64_t bytes) {
  void *p = (void *)*at;
  *at += (uintptr_t)round_up(bytes, 64);
  return p;
}

// Places the buffers from address `at` on; returns the address after them: their size, if `at` is 0.
static inline uintptr_t attend_layout(AttendScratch *w, uintptr_t at, int64_t keys, int64_t D) {
  int64_t Dp = padded(D), item = (int64_t)sizeof(elem);
  w->q = take(&at, BR * Dp * item);
  w->p = take(&at, PAIR == 2 ? BR * BC * item : 0);
  w->rows = take(&at, BC * Dp * item);
  w->k = take(&at, round_up(keys, BC) * Dp * item);
  w->v = take(&at, round_up(keys, BC) * Dp * item);
  w->s = take(&at, BR * BC * 4);
  w->o = take(&at, BR * Dp * 4);
  return at;
}

static inline int64_t attend_scratch(int64_t keys, int64_t D, int64_t threads) {
  AttendScratch w;
  return threads * (int64_t)attend_layout(&w, 0, keys, D);
}

// y (n, H D) and lse (n, or NULL) of n <= BR queries of one head. Query r sees the existing keys among 0 .. first + r.
static void attend_rows(real *y, float *lse, const Attend *x, const AttendScratch *w, const real *q, int n,
                        int64_t first, int64_t element) {
  int64_t D = x->D, Dp = padded(D), keys = x->position + x->T;
  float scale = 1.0f / sqrtf((float)D), max[BR], factor[BC];
  vfloat sum[BR];  // by lanes
  pack_rows(w->q, q, x->q_row, n, (int)round_up(n, MR), D);
  for (int r = 0; r < n; r++) {
    max[r] = -INFINITY;
    sum[r] = (vfloat){0};
  }
  for (int64_t key = 0; key < smaller(first + n, keys); key += BC) {
    int64_t shift = first - key;
    block_scores(w->s, w->q, w->k + key * Dp / PAIR, n, shift, D);
    float top[BR];
    int width[BR];
    for (int r = 0; r < n; r++) {
      float *s = w->s + r * BC;
      vfloat tops = (vfloat){0} - INFINITY;
      width[r] = smaller(BC, round_up(larger(0, r / MR * MR + MR + shift), VL));
      for (int c = larger(0, smaller(r + shift + 1, keys - key)); c < width[r]; c++) s[c] = -INFINITY;
      for (int c = 0; c < width[r]; c += VL) tops = vector_max(*(vfloat *)(s + c), tops);
      top[r] = max_of_lanes(tops) * scale;
    }
    for (int r = 0; r < n; r++)
      if (top[r] > max[r] + SLACK) {
        float shrink = vexp(max[r] - top[r]);
        max[r] = top[r];
        sum[r] *= shrink;
        if (key > 0)
          for (int64_t d = 0; d < Dp; d++) w->o[r * Dp + d] *= shrink;
      }
    for (int r = 0; r < n; r++) {
      float *s = w->s + r * BC, base = max[r];
      for (int c = 0; c < width[r]; c += VL) {
#pragma GCC unroll 1  // not unrolled, it compiles to one vector
        for (int l = c; l < c + VL; l++) s[l] = vexp(s[l] * scale - base);
        sum[r] += *(vfloat *)(s + c);
      }
    }
    if (x->drop.threshold)
      for (int r = 0; r < n; r++) {
        dropout_factors(factor, element + r * x->T + key, width[r], x->drop);
        for (int c = 0; c < width[r]; c++) w->s[r * BC + c] *= factor[c];
      }
    block_pv_gemm(w->o, as_rows(w->p, w->s, n), w->v + key / PAIR * Dp, n, shift, Dp, key > 0);
  }
  for (int r = 0; r < n; r++) {
    float total = sum_of_lanes(sum[r]);
    for (int64_t d = 0; d < D; d++) y[r * x->H * D + d] = store(w->o[r * Dp + d] / total);
    if (lse) lse[r] = max[r] + logf(total);
  }
}

// y (B T, H D); lse (B, H, T) or NULL. Each thread computes consecutive (head, row block) items of equal total cost and
// packs the keys that its queries see. The arithmetic of an item does not depend on the thread.
static void attend(real *y, float *lse, const Attend *x, char *scratch) {
  int64_t T = x->T, blocks = (T + BR - 1) / BR, keys = x->position + T, D = x->D, Dp = padded(D);
  int64_t cost = 0;
  for (int64_t i = 0; i < blocks; i++) cost += (x->causal ? x->position + i * BR : keys - 1) / BC + 1;
  int64_t total = cost * x->B * x->H;
#pragma omp parallel
  {
    int64_t from = total * hg_thread() / hg_num_threads(), to = total * (hg_thread() + 1) / hg_num_threads(), at = 0;
    AttendScratch w;
    attend_layout(&w, (uintptr_t)scratch + (uintptr_t)(hg_thread() * attend_scratch(keys, D, 1)), keys, D);
    for (int64_t head = 0; head < x->B * x->H; head++) {
      int64_t b = head / x->H, h = head % x->H, packed = 0;
      int64_t kv = b * x->kv_seq + h / (x->H / x->K) * D;
      const real *k = x->k + kv, *v = x->v + kv;
      for (int64_t i = 0; i < blocks; i++) {
        int64_t row = i * BR, n = smaller(BR, T - row), first = x->causal ? x->position + row : keys - 1;
        int mine = from <= at && at < to;
        at += first / BC + 1;
        if (!mine) continue;
        for (; packed < smaller(first + n, keys); packed += BC) {
          int filled = smaller(BC, keys - packed);
          pack_rows(w.rows, k + packed * x->kv_row, x->kv_row, filled, BC, D);
          pack_transposed(w.k + packed * Dp / PAIR, w.rows, Dp);
          pack_rows(w.rows, v + packed * x->kv_row, x->kv_row, filled, BC, D);
          pack_pairs(w.v + packed / PAIR * Dp, w.rows, BC, Dp);
        }
        attend_rows(y + ((b * T + row) * x->H + h) * D, lse ? lse + head * T + row : NULL, x, &w,
                    x->q + b * x->q_seq + row * x->q_row + h * D, (int)n, first, (head * T + row) * T);
      }
    }
  }
}
