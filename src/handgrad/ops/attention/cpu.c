// attention: y = softmax(q k' / sqrt(D), causal or not) v, with dropout of the probabilities   math: README.md §2, §3
// forward   writes =  y: (N, H D) dtype;  lse: (B, H, T) f32
// backward  writes =  dqkv: (N, (H + 2 K) D) dtype
// numerics  f32 softmax and sums; probabilities are recomputed from lse; with AVX512-BF16 they are rounded to bf16
// layout    forward: threads divide (head, row block) items; backward: threads divide key/value heads, each with all
//           query heads that read it, one after another; the outer loop runs over key blocks
// determinism  fixed order for any number of threads; dropout depends on the step scalars, call and element index alone
// source    own work, after Dao 2023 (FlashAttention-2), algorithms 1 and 2
#include "flash.h"

ENTRY(attention_forward) {
  real *y = a->y;            // (N, H D)
  float *lse = a->lse;       // (B, H, T)
  const real *qkv = a->qkv;  // (N, H + 2 K, D)
  int64_t N = a->N, T = a->T, H = a->H, K = a->K, D = a->D;
  DropoutRule drop = dropout_rule(a->scalars, (float)a->p, a->stream);
  char *scratch = a->scratch;     // attention_forward_scratch bytes
  int64_t row = (H + 2 * K) * D;
  Attend x = {.q = qkv, .k = qkv + H * D, .v = qkv + (H + K) * D, .q_row = row, .kv_row = row, .q_seq = T * row,
              .kv_seq = T * row, .B = N / T, .T = T, .H = H, .K = K, .D = D, .causal = a->causal != 0, .drop = drop};
  attend(y, lse, &x, scratch);
}

SCRATCH(attention_forward)(int64_t T, int64_t D, int64_t threads) {
  return attend_scratch(T, D, threads);
}

// Buffers of one head. Tp is T rounded up to whole blocks. Without vdpbf16ps pairs and rows are the same buffers.
typedef struct {
  elem *q_rows, *dy_rows;              // (Tp, Dp)
  unit *q_pairs, *dy_pairs, *k_pairs;  // (Tp / PAIR, Dp)
  unit *k, *v;                         // transposed panels
  elem *rows;                          // (BC, Dp), a buffer for packing
  float *dq, *dk, *dv;                 // (Tp, Dp); dk, dv: (BC, Dp), or (Tp, Dp) if several query heads add to them
  float *delta;                        // (T) rowsum of dy y
  float *s, *ds;                       // (BR, BC) scores, then dropped probabilities; gradients of the scores
  elem *ds_rows;                       // the same as operands of GEMMs
  unit *p_pairs, *ds_pairs;
} BackwardScratch;

static uintptr_t backward_layout(BackwardScratch *w, uintptr_t at, int64_t T, int64_t D, int64_t group) {
  int64_t Dp = padded(D), head = round_up(T, BC) * Dp, item = (int64_t)sizeof(elem), block = BR * BC;
  w->q_rows = take(&at, head * item);
  w->dy_rows = take(&at, head * item);
  w->k_pairs = take(&at, head * item);
  w->k = take(&at, head * item);
  w->v = take(&at, head * item);
  w->rows = take(&at, BC * Dp * item);
  w->dq = take(&at, head * 4);
  w->dk = take(&at, (group > 1 ? head : BC * Dp) * 4);
  w->dv = take(&at, (group > 1 ? head : BC * Dp) * 4);
  w->delta = take(&at, round_up(T, BC) * 4);
  w->s = take(&at, block * 4);
  w->ds = take(&at, block * 4);
#if PAIR == 2
  w->q_pairs = take(&at, head * item);
  w->dy_pairs = take(&at, head * item);
  w->ds_rows = take(&at, block * item);
  w->p_pairs = take(&at, block * item);
  w->ds_pairs = take(&at, block * item);
#else
  w->q_pairs = w->q_rows;
  w->dy_pairs = w->dy_rows;
  w->ds_rows = w->ds;
  w->p_pairs = w->s;
  w->ds_pairs = w->ds;
#endif
  return at;
}

static void as_pairs(unit *pairs, const float *s, int n) {
#if PAIR == 2
  __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                   20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int r = 0; r < n; r += 2, s += 2 * BC, pairs += BC)
    for (int c = 0; c < BC; c += 16) {
      __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(s + BC + c), _mm512_loadu_ps(s + c));
      _mm512_storeu_si512(pairs + c, _mm512_permutexvar_epi16(order, (__m512i)both));
    }
#else
  (void)pairs, (void)s, (void)n;
#endif
}

// dx (n keys, Dp) = or += p' (keys, queries) dy (queries, Dp), over queries that see the key only
static void block_ptdy_gemm(float *dx, const unit *p, const unit *dy, int n, int queries, int64_t shift, int64_t Dp,
                            int add) {
  int end = (queries + PAIR - 1) / PAIR;
  for (int c = 0; c < Dp; c += NR)
    for (int r = 0; r < n; r += MR) {
      int start = larger(0, r - shift) / PAIR;
      tile(dx + r * Dp + c, Dp, p + start * BC + r, 1, BC, dy + start * Dp + c, Dp, end - start, add);
    }
}

// In place: s becomes the probabilities after dropout, ds the gradient of q k'. The first `keys` columns are keys.
static void block_softmax_back(float *s, float *ds, const float *lse, const float *delta, int n, int keys,
                               int64_t shift, float scale, DropoutRule drop, int64_t element, int64_t T) {
  float factor[BC];
  for (int c = 0; c < BC; c++) factor[c] = 1.0f;
  for (int r = 0; r < (int)round_up(n, PAIR); r++, s += BC, ds += BC) {
    int seen = r < n ? smaller(keys, r + shift + 1) : 0;
    int width = smaller(BC, round_up(r / MR * MR + MR + shift, VL));
    float top = r < n ? lse[r] : 0.0f, mean = r < n ? delta[r] : 0.0f;
    if (drop.threshold) dropout_factors(factor, element + r * T, width, drop);
    for (int c = 0; c < width; c += VL) {
#pragma GCC unroll 1  // left as a loop, it becomes one vector
      for (int l = c; l < c + VL; l++) s[l] = vexp(s[l] * scale - top);
      vfloat *p = (vfloat *)(s + c), *dp = (vfloat *)(ds + c), kept = *(vfloat *)(factor + c);
      vbits mask = (vbits)((vbits)LANES + (uint32_t)c < (uint32_t)seen);
      *dp = (vfloat)((vbits)(*p * (*dp * kept - mean) * scale) & mask);
      *p = (vfloat)((vbits)(*p * kept) & mask);
    }
  }
}

static void write_rows(real *y, int64_t y_row, const float *x, int n, int64_t D) {
  for (int r = 0; r < n; r++, y += y_row, x += padded(D))
    for (int64_t d = 0; d < D; d++) y[d] = store(x[d]);
}

// The gradients of query head h of one sequence; dk and dv add to those of earlier heads of the group.
static void backward_head(real *dqkv, const real *dy, const real *qkv, const real *y, const float *lse, int64_t T,
                          int64_t H, int64_t K, int64_t D, int causal, int64_t h, DropoutRule drop, int64_t element,
                          const BackwardScratch *w) {
  int64_t Dp = padded(D), C = H * D, row = (H + 2 * K) * D, group = H / K;
  int64_t q = h * D, k = (H + h / group) * D, v = k + K * D;  // offsets in a row
  int adds = h % group > 0;  // an earlier head of the group wrote dk and dv
  float scale = 1.0f / sqrtf((float)D);
  for (int64_t t = 0; t < T; t += BC) {
    int n = smaller(BC, T - t);
    pack_rows(w->q_rows + t * Dp, qkv + t * row + q, row, n, BC, D);
    pack_pairs(w->q_pairs + t / PAIR * Dp, w->q_rows + t * Dp, BC, Dp);
    pack_rows(w->dy_rows + t * Dp, dy + t * C, C, n, BC, D);
    pack_pairs(w->dy_pairs + t / PAIR * Dp, w->dy_rows + t * Dp, BC, Dp);
    pack_rows(w->rows, qkv + t * row + k, row, n, BC, D);
    pack_pairs(w->k_pairs + t / PAIR * Dp, w->rows, BC, Dp);
    pack_transposed(w->k + t * Dp / PAIR, w->rows, Dp);
    pack_rows(w->rows, qkv + t * row + v, row, n, BC, D);
    pack_transposed(w->v + t * Dp / PAIR, w->rows, Dp);
  }
  for (int64_t t = 0; t < T; t++) {
    prefetch(y + t * C + D, D);  // the next head
    w->delta[t] = dot(dy + t * C, y + t * C, D);
  }
  for (int64_t key = 0; key < T; key += BC) {
    int keys = smaller(BC, T - key);
    float *dk = w->dk + (group > 1 ? key * Dp : 0), *dv = w->dv + (group > 1 ? key * Dp : 0);
    int64_t start = causal ? key : 0;
    for (int64_t t = start; t < T; t += BR) {
      int n = smaller(BR, T - t), add = adds || t > start;
      int64_t shift = causal ? t - key : BC;
      block_scores(w->s, w->q_rows + t * Dp, w->k + key * Dp / PAIR, n, shift, D);
      block_scores(w->ds, w->dy_rows + t * Dp, w->v + key * Dp / PAIR, n, shift, D);
      block_softmax_back(w->s, w->ds, lse + t, w->delta + t, n, keys, shift, scale, drop, element + t * T + key, T);
      as_pairs(w->p_pairs, w->s, n);
      as_pairs(w->ds_pairs, w->ds, n);
      block_ptdy_gemm(dv, w->p_pairs, w->dy_pairs + t / PAIR * Dp, keys, n, shift, Dp, add);
      block_ptdy_gemm(dk, w->ds_pairs, w->q_pairs + t / PAIR * Dp, keys, n, shift, Dp, add);
      const elem *ds = as_rows(w->ds_rows, w->ds, n);
      block_pv_gemm(w->dq + t * Dp, ds, w->k_pairs + key / PAIR * Dp, n, shift, Dp, key > 0);
    }
    if (h % group == group - 1) {
      write_rows(dqkv + key * row + k, row, dk, keys, D);
      write_rows(dqkv + key * row + v, row, dv, keys, D);
    }
  }
  for (int64_t t = 0; t < T; t += BR)
    write_rows(dqkv + t * row + q, row, w->dq + t * Dp, smaller(BR, T - t), D);
}

ENTRY(attention_backward) {
  real *dqkv = a->dqkv;       // (N, H + 2 K, D)
  const real *dy = a->dy;     // (N, H D)
  const real *qkv = a->qkv;   // (N, H + 2 K, D)
  const real *y = a->y;       // (N, H D)
  const float *lse = a->lse;  // (B, H, T)
  int64_t N = a->N, T = a->T, H = a->H, K = a->K, D = a->D, group = H / K;
  int causal = a->causal != 0;
  DropoutRule drop = dropout_rule(a->scalars, (float)a->p, a->stream);
  char *scratch = a->scratch;    // attention_backward_scratch bytes
  BackwardScratch size;
  uintptr_t bytes = backward_layout(&size, 0, T, D, group);
#pragma omp parallel for schedule(static)
  for (int64_t item = 0; item < N / T * K; item++) {
    int64_t b = item / K, q_seq = b * T * (H + 2 * K) * D;
    BackwardScratch w;
    backward_layout(&w, (uintptr_t)scratch + (uintptr_t)hg_thread() * bytes, T, D, group);
    for (int64_t h = item % K * group; h < (item % K + 1) * group; h++) {
      int64_t at = (b * T * H + h) * D, head = b * H + h;
      backward_head(dqkv + q_seq, dy + at, qkv + q_seq, y + at, lse + head * T, T, H, K, D, causal, h, drop,
                    head * T * T, &w);
    }
  }
}

SCRATCH(attention_backward)(int64_t T, int64_t H, int64_t K, int64_t D, int64_t threads) {
  BackwardScratch w;
  return threads * (int64_t)backward_layout(&w, 0, T, D, H / K);
}
