// attention: y = softmax(scale q k' + bias, over the keys that a query sees) v, with dropout      math: README.md §2, §3
// forward   writes =  y: (N, H D) dtype;  lse: (B, H, T) f32
// backward  writes =  dqkv: (N, (H + 2 K) D) dtype
// numerics  f32 softmax and sums; probabilities are recomputed from lse; with AVX512-BF16 they are rounded to bf16
// layout    forward: threads divide (head, row block) items; backward: threads divide key/value heads, each with all
//           query heads that read it, one after another; the outer loop runs over key blocks
// determinism  fixed order for any number of threads; dropout depends on the step scalars, call and element index alone
// source    own work, after Dao 2023 (FlashAttention-2), algorithms 1 and 2
#include "flash.h"

// Where q, k and v lie: packed in rows of qkv, or k and v in rows of kv.
static Attend operands(const real *qkv, const real *kv, int64_t B, View view, int64_t H, int64_t K, int64_t D) {
  int64_t q_row = (kv ? H : H + 2 * K) * D, kv_row = kv ? 2 * K * D : q_row;
  const real *k = kv ? kv : qkv + H * D;
  return (Attend){.q = qkv, .k = k, .v = k + K * D, .q_row = q_row, .kv_row = kv_row, .q_seq = view.T * q_row,
                  .kv_seq = view.S * kv_row, .B = B, .H = H, .K = K, .D = D, .view = view};
}

ENTRY(attention_forward) {
  real *y = a->y;                  // (N, H D)
  float *lse = a->lse;             // (B, H, T)
  const real *qkv = a->qkv;        // (N, H + 2 K, D); (N, H, D) with kv
  const real *kv = a->kv;          // (M, 2 K, D)
  const real *rel = a->rel;        // (R, H)
  const int32_t *first_key = a->first_key, *last_key = a->last_key;  // (N)
  char *scratch = a->scratch;      // attention_forward_scratch bytes
  View view = {.T = a->T, .S = a->S, .window = a->window, .causal = a->causal != 0,
               .first_key = first_key, .last_key = last_key};
  Attend x = operands(qkv, kv, a->N / a->T, view, a->H, a->K, a->D);
  x.scale = (float)a->scale;
  x.rel = rel;
  x.R = a->R;
  x.drop = dropout_rule(a->scalars, (float)a->p, a->stream);
  attend(y, lse, &x, scratch);
}

SCRATCH(attention_forward)(int64_t T, int64_t S, int64_t D, int64_t threads) {
  return attend_scratch(T, S, D, threads);
}

// Buffers of one head. Tp and Sp are T and S rounded up to whole blocks. Without vdpbf16ps pairs and rows are the same
// buffers.
typedef struct {
  elem *q_rows, *dy_rows;     // (Tp, Dp)
  unit *q_pairs, *dy_pairs;   // (Tp / PAIR, Dp)
  unit *k_pairs;              // (Sp / PAIR, Dp)
  unit *k, *v;                // transposed panels
  elem *rows;                 // (BC, Dp), a buffer for packing
  float *dq, *dk, *dv;        // (Tp, Dp); dk, dv: (BC, Dp), or (Sp, Dp) if several query heads add to them
  float *delta;               // (T) rowsum of dy y
  int32_t *from, *to;         // (Tp) keys that a query sees
  RowsSee *see;               // (Tp / BR) what row blocks see
  float *bias, *dbias;        // (T + S) by key - query + T - 1, and its gradient
  float *s, *ds;              // (BR, BC) scores, then dropped probabilities; gradients of the scores
  elem *ds_rows;              // the same as operands of GEMMs
  unit *p_pairs, *ds_pairs;
} BackwardScratch;

static uintptr_t backward_layout(BackwardScratch *w, uintptr_t at, int64_t T, int64_t S, int64_t D, int64_t group) {
  int64_t Dp = padded(D), Tp = round_up(T, BC), item = (int64_t)sizeof(elem), block = BR * BC;
  int64_t queries = Tp * Dp, keys = round_up(S, BC) * Dp;
  w->q_rows = take(&at, queries * item);
  w->dy_rows = take(&at, queries * item);
  w->k_pairs = take(&at, keys * item);
  w->k = take(&at, keys * item);
  w->v = take(&at, keys * item);
  w->rows = take(&at, BC * Dp * item);
  w->dq = take(&at, queries * 4);
  w->dk = take(&at, (group > 1 ? keys : BC * Dp) * 4);
  w->dv = take(&at, (group > 1 ? keys : BC * Dp) * 4);
  w->delta = take(&at, Tp * 4);
  w->from = take(&at, Tp * 4);
  w->to = take(&at, Tp * 4);
  w->see = take(&at, Tp / BR * (int64_t)sizeof(RowsSee));
  w->bias = take(&at, (T + S) * 4);
  w->dbias = take(&at, (T + S) * 4);
  w->s = take(&at, block * 4);
  w->ds = take(&at, block * 4);
#if PAIR == 2
  w->q_pairs = take(&at, queries * item);
  w->dy_pairs = take(&at, queries * item);
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

// dx (n keys, Dp) = or += p' (keys, queries) dy (queries, Dp), over queries that see a key of the tile only
static void block_ptdy_gemm(float *dx, const unit *p, const unit *dy, int n, const Seen *seen, int64_t Dp, int add) {
  for (int c = 0; c < Dp; c += NR)
    for (int r = 0; r < n; r += MR) {
      int start = seen->first[r / MR] / PAIR, k = (seen->stop[r / MR] + PAIR - 1) / PAIR - start;
      if (k > 0 || !add)
        tile(dx + r * Dp + c, Dp, p + start * BC + r, 1, BC, dy + start * Dp + c, Dp, k, add);
    }
}

// In place: s becomes the probabilities after dropout, ds the gradient of q k'. With a bias (of row 0 and the first
// key), dbias += the gradients of the scores, by distance.
static void block_softmax_back(float *s, float *ds, const float *lse, const float *delta, int n, const Seen *seen,
                               float scale, const float *bias, float *dbias, DropoutRule drop, int64_t element,
                               int64_t S) {
  float factor[BC], unit_scale = bias ? 1.0f : scale;
  for (int c = 0; c < BC; c++) factor[c] = 1.0f;
  for (int r = 0; r < (int)round_up(n, PAIR); r++, s += BC, ds += BC) {
    int low = seen->begin[r / MR] / VL * VL, width = (int)round_up(seen->end[r / MR], VL);
    uint32_t from = (uint32_t)seen->from[r], count = (uint32_t)seen->to[r] - from;
    float top = r < n ? lse[r] : 0.0f, mean = r < n ? delta[r] : 0.0f;
    if (drop.threshold) dropout_factors(factor, element + r * S, width, drop);
    if (bias && r < n) scale_and_bias(s, bias - r, low, seen->end[r / MR], scale);
    for (int c = low; c < width; c += VL) {
#pragma GCC unroll 1  // left as a loop, it becomes one vector
      for (int l = c; l < c + VL; l++) s[l] = vexp(s[l] * unit_scale - top);
      vfloat *p = (vfloat *)(s + c), *dp = (vfloat *)(ds + c), kept = *(vfloat *)(factor + c);
      vbits mask = (vbits)((vbits)LANES + ((uint32_t)c - from) < count);
      *dp = (vfloat)((vbits)(*p * (*dp * kept - mean) * unit_scale) & mask);
      *p = (vfloat)((vbits)(*p * kept) & mask);
    }
    for (int c = 0; seen->gaps && c < BC; c++)
      if (c < low || c >= width) s[c] = ds[c] = 0.0f;
    if (bias && r < n)
      for (int c = low; c < seen->end[r / MR]; c++) {
        dbias[c - r] += ds[c];
        ds[c] *= scale;
      }
  }
}

static void write_rows(real *y, int64_t y_row, const float *x, int n, int64_t D) {
  for (int r = 0; r < n; r++, y += y_row, x += padded(D))
    for (int64_t d = 0; d < D; d++) y[d] = store(x[d]);
}

// Operands and results of a backward pass.
typedef struct {
  Attend x;
  const real *dy, *y;     // (N, H D)
  const float *lse;       // (B, H, T)
  real *dq, *dk, *dv;     // laid out as q, k and v
} Gradients;

// Packs the operands of query head h of sequence b, and finds what its queries see.
static void pack_operands(const Gradients *g, const real *q, const real *k, const real *v, int64_t b, int64_t h,
                          const BackwardScratch *w) {
  const Attend *x = &g->x;
  int64_t T = x->view.T, D = x->D, Dp = padded(D), C = x->H * D, at = b * T * C + h * D;
  for (int64_t t = 0; t < T; t += BC) {
    int n = smaller(BC, T - t);
    pack_rows(w->q_rows + t * Dp, q + t * x->q_row, x->q_row, n, BC, D);
    pack_pairs(w->q_pairs + t / PAIR * Dp, w->q_rows + t * Dp, BC, Dp);
    pack_rows(w->dy_rows + t * Dp, g->dy + at + t * C, C, n, BC, D);
    pack_pairs(w->dy_pairs + t / PAIR * Dp, w->dy_rows + t * Dp, BC, Dp);
    w->see[t / BR] = rows_see(w->from + t, w->to + t, &x->view, b * T + t, n);
  }
  for (int64_t t = 0; t < x->view.S; t += BC) {
    int n = smaller(BC, x->view.S - t);
    pack_rows(w->rows, k + t * x->kv_row, x->kv_row, n, BC, D);
    pack_pairs(w->k_pairs + t / PAIR * Dp, w->rows, BC, Dp);
    pack_transposed(w->k + t * Dp / PAIR, w->rows, Dp);
    pack_rows(w->rows, v + t * x->kv_row, x->kv_row, n, BC, D);
    pack_transposed(w->v + t * Dp / PAIR, w->rows, Dp);
  }
  for (int64_t t = 0; t < T; t++) {
    prefetch(g->y + at + t * C + D, D);  // the next head
    w->delta[t] = dot(g->dy + at + t * C, g->y + at + t * C, D);
  }
}

// The gradients of query head h of sequence b; dk and dv add to those of earlier heads of the group.
static void backward_head(const Gradients *g, int64_t b, int64_t h, const BackwardScratch *w) {
  const Attend *x = &g->x;
  int64_t T = x->view.T, S = x->view.S, D = x->D, Dp = padded(D), group = x->H / x->K;
  int64_t q = b * x->q_seq + h * D, kv = b * x->kv_seq + h / group * D, head = b * x->H + h;
  Seen all, part;
  seen_all(&all);
  pack_operands(g, x->q + q, x->k + kv, x->v + kv, b, h, w);
  for (int64_t key = 0; key < S; key += BC) {
    int keys = smaller(BC, S - key), add = h % group > 0;  // an earlier head of the group wrote dk and dv
    float *dk = w->dk + (group > 1 ? key * Dp : 0), *dv = w->dv + (group > 1 ? key * Dp : 0);
    for (int64_t t = 0; t < T; t += BR) {
      RowsSee see = w->see[t / BR];
      if (see.any.begin >= key + keys || see.any.end <= key) continue;
      int n = smaller(BR, T - t);
      int64_t distance = key - t + T - 1;
      const Seen *seen = seen_columns(&part, &all, see, w->from + t, w->to + t, key, n);
      block_scores(w->s, w->q_rows + t * Dp, w->k + key * Dp / PAIR, n, seen, D);
      block_scores(w->ds, w->dy_rows + t * Dp, w->v + key * Dp / PAIR, n, seen, D);
      block_softmax_back(w->s, w->ds, g->lse + head * T + t, w->delta + t, n, seen, x->scale,
                         x->rel ? w->bias + distance : NULL, w->dbias + distance, x->drop, (head * T + t) * S + key, S);
      as_pairs(w->p_pairs, w->s, n);
      as_pairs(w->ds_pairs, w->ds, n);
      block_ptdy_gemm(dv, w->p_pairs, w->dy_pairs + t / PAIR * Dp, keys, seen, Dp, add);
      block_ptdy_gemm(dk, w->ds_pairs, w->q_pairs + t / PAIR * Dp, keys, seen, Dp, add);
      const elem *ds = as_rows(w->ds_rows, w->ds, n);
      block_pv_gemm(w->dq + t * Dp, ds, w->k_pairs + key / PAIR * Dp, n, seen, Dp, key > see.any.begin / BC * BC);
      add = 1;
    }
    if (!add) {  // no query sees these keys
      memset(dk, 0, (size_t)(BC * Dp) * 4);
      memset(dv, 0, (size_t)(BC * Dp) * 4);
    }
    if (h % group == group - 1) {
      write_rows(g->dk + kv + key * x->kv_row, x->kv_row, dk, keys, D);
      write_rows(g->dv + kv + key * x->kv_row, x->kv_row, dv, keys, D);
    }
  }
  for (int64_t t = 0; t < T; t += BR) {
    int sees_nothing = w->see[t / BR].any.end == 0;
    if (sees_nothing) memset(w->dq + t * Dp, 0, (size_t)(BR * Dp) * 4);
    write_rows(g->dq + q + t * x->q_row, x->q_row, w->dq + t * Dp, smaller(BR, T - t), D);
  }
}

// sums (R): the gradients of a head's biases, summed over the distances of each bucket.
static void bucket_sums(float *sums, const float *dbias, const Attend *x, const int *bucket) {
  int64_t T = x->view.T, S = x->view.S;
  memset(sums, 0, (size_t)x->R * sizeof *sums);
  for (int64_t i = 0; i < T + S - 1; i++) sums[bucket[clamped(i - T + 1)]] += dbias[i];
}

ENTRY(attention_backward) {
  real *dqkv = a->dqkv, *dkv = a->dkv;               // (N, H + 2 K, D); with kv (N, H, D) and (M, 2 K, D)
  float *drel = a->drel;                             // (R, H), in and out
  const real *dy = a->dy, *qkv = a->qkv;             // (N, H D); as dqkv
  const real *kv = a->kv, *rel = a->rel;             // as dkv; (R, H)
  const int32_t *first_key = a->first_key, *last_key = a->last_key;  // (N)
  const real *y = a->y;                              // (N, H D)
  const float *lse = a->lse;                         // (B, H, T)
  char *scratch = a->scratch;                        // attention_backward_scratch bytes
  int64_t T = a->T, S = a->S, H = a->H, K = a->K, D = a->D, R = a->R, B = a->N / T, group = H / K;
  View view = {.T = T, .S = S, .window = a->window, .causal = a->causal != 0,
               .first_key = first_key, .last_key = last_key};
  Gradients g = {.x = operands(qkv, kv, B, view, H, K, D), .dy = dy, .y = y, .lse = lse, .dq = dqkv};
  g.x.scale = (float)a->scale;
  g.x.rel = rel;
  g.x.R = R;
  g.x.drop = dropout_rule(a->scalars, (float)a->p, a->stream);
  g.dk = kv ? dkv : dqkv + H * D;
  g.dv = g.dk + K * D;
  BackwardScratch size;
  uintptr_t bytes = backward_layout(&size, 0, T, S, D, group);
  float *sums = (float *)(scratch + (uintptr_t)hg_max_threads() * bytes);  // (B, H, R)
  int bucket[2 * FAR + 1];
  if (rel) distance_buckets(bucket, R, view.causal);
#pragma omp parallel for schedule(static)
  for (int64_t item = 0; item < B * K; item++) {
    BackwardScratch w;
    backward_layout(&w, (uintptr_t)scratch + (uintptr_t)hg_thread() * bytes, T, S, D, group);
    for (int64_t h = item % K * group; h < (item % K + 1) * group; h++) {
      if (rel) head_bias(w.bias, &g.x, bucket, h);
      if (rel) memset(w.dbias, 0, (size_t)(T + S) * 4);
      backward_head(&g, item / K, h, &w);
      if (rel) bucket_sums(sums + (item / K * H + h) * R, w.dbias, &g.x, bucket);
    }
  }
  for (int64_t i = 0; i < (drel ? R * H : 0); i++) {
    float sum = a->accumulate_drel ? drel[i] : 0.0f;
    for (int64_t b = 0; b < B; b++) sum += sums[(b * H + i % H) * R + i / H];
    drel[i] = sum;
  }
}

SCRATCH(attention_backward)(int64_t N, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, int64_t R,
                            int64_t threads) {
  BackwardScratch w;
  return threads * (int64_t)backward_layout(&w, 0, T, S, D, H / K) + N / T * H * R * 4;
}
