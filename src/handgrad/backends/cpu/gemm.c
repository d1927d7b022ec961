// gemm: a packed matrix product for one or a few cores        contract: gemm.h
//
// The heart is a tile: MR x NR sums held in registers for a whole block of k. Each step of k loads NR numbers of B and
// broadcasts MR of A, so one load feeds several multiply-adds:
//
//               NR (2 vectors)        isa        lanes  MR x NR   registers of sums
//             +---------------+       avx512      16    14 x 32       28 of 32
//   A: MR     |  MR x NR sums |       avx2         8     6 x 16       12 of 16
//   numbers   |               |       neon         4     8 x 12       24 of 32
//             +---------------+       sse          4     4 x  8        8 of 16
//
// Operands are packed first, so that a tile reads two streams from front to back: A in panels of MR rows, B in panels
// of NR columns, k outermost inside a panel, in units of 4 bytes (pack.h).
//
// The smaller operand (by rows of A against columns of B) is packed once, by all threads, and is shared. The larger one
// is cut into chunks of a few panels; a thread claims a chunk and packs it for itself, right before it multiplies it
// with all shared panels, so a chunk is read from memory once and stays in the thread's own L2. Meanwhile it already
// asks for the source lines of its next chunk.
//
// k is cut into blocks of at most K_UNITS; between blocks sums are kept as float, in the result or in scratch. A sum
// runs over k in one fixed order, and threads share out panels only, so their number never changes a bit.
//
// With up to DOT_ROWS rows of A (decoding) nothing is packed: the product is read once, as dot products.
//
// source  own work after Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", TOMS 2008
#include "gemm.h"
#include "pack.h"
#include "vmath.h"
#include <sched.h>

#if defined(__AVX512F__)
enum { MR = 14, NV = 2 };
#elif defined(__AVX2__)
enum { MR = 6, NV = 2 };
#elif defined(__aarch64__)
enum { MR = 8, NV = 3 };
#else
enum { MR = 4, NV = 2 };
#endif
enum {
  NR = NV * LANES,
  AR = (MR + LANES - 1) / LANES * LANES,  // stride of a packed A panel: MR rounded up to whole vectors
  K_UNITS = 1024,                         // a B panel of a block of k: 1024 * 32 * 4 = 128 KiB of a 1 MiB L2
  CHUNK_BYTES = 256 * 1024,               // of a packed chunk; about as much again is on its way for the next one
  SHARED = 2048,                          // rows or columns of an outer block bound the scratch: of the packed side,
  STREAMED = 4096,                        // and of sums that wait for the next block of k
  DOT_ROWS = 4,
};
static const double SMALL = 5e5;             // multiply-adds below which waking threads costs more than it saves
static const int64_t STREAM_BYTES = 1 << 20; // a larger result has left the caches before anyone reads it

// ---- the tile ------------------------------------------------------------------------------------------------------

// sum + a * b in every lane; with PAIRS a unit is two products.
static inline vec multiply_add(vec sum, vec a, vec b) {
#if PAIRS
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + a * b;
#endif
}

// Source lines of the thread's next chunk, asked for while it computes this one: a few every SLICE steps of k, so that
// they neither wait for memory when they are packed nor crowd out the loads of the tile.
typedef struct {
  const char *row;
  int64_t stride, bytes, at, rows;  // bytes wanted of each row; where we are; rows left
  int64_t lines;                    // per slice
} Ahead;
enum { SLICE = 16 };

static inline void fetch_ahead(Ahead *n) {
  for (int64_t i = 0; i < n->lines && n->rows > 0; i++) {
    __builtin_prefetch(n->row + n->at, 0, 2);
    n->at += 64;
    if (n->at >= n->bytes) {
      n->at = 0;
      n->row += n->stride;
      n->rows--;
    }
  }
}

// What a tile does to memory: writes, adds, or writes past the caches (no line is read only to be overwritten).
typedef enum { WRITE, ADD, STREAM } Mode;

static inline void put_vec(float *to, vec v, Mode mode) {
  vec old;
  if (mode == ADD) {
    memcpy(&old, to, sizeof old);
    v += old;
  }
#if defined(__AVX512F__)
  if (mode == STREAM) {
    _mm512_stream_ps(to, (__m512)v);
    return;
  }
#elif defined(__AVX2__)
  if (mode == STREAM) {
    _mm256_stream_ps(to, (__m256)v);
    return;
  }
#endif
  memcpy(to, &v, sizeof v);
}

// c(rows, NR) = or += panel of A * panel of B. `rows` is a constant after inlining, so the sums live in registers.
static inline __attribute__((always_inline)) void tile_rows(const int rows, int64_t n_units, const float *a,
                                                            const float *b, float *c, int64_t ldc, Mode mode,
                                                            Ahead *ahead) {
  vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = (vec){0};
    if (mode == STREAM) continue;
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + NR / 2, 1);
  }
  for (int64_t done = 0; done < n_units; done += SLICE) {
    fetch_ahead(ahead);
    for (int64_t u = least(SLICE, n_units - done); u > 0; u--) {
      vec bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) memcpy(&bv[j], b + j * LANES, sizeof(vec));
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        vec ai = a[i] - (vec){0};  // a[i] in every lane
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = multiply_add(sum[i][j], ai, bv[j]);
      }
      __builtin_prefetch(a + 24 * AR);  // both streams come from L2 or L3: ask some 700 cycles ahead
      __builtin_prefetch(b + 24 * NR);
      __builtin_prefetch(b + 24 * NR + NR / 2);
      a += AR;
      b += NR;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) put_vec(c + i * ldc + j * LANES, sum[i][j], mode);
  }
}

static void tile(int64_t rows, int64_t n_units, const float *a, const float *b, float *c, int64_t ldc, Mode mode,
                 Ahead *ahead) {
#define ROWS(r) case r: tile_rows(r <= MR ? r : MR, n_units, a, b, c, ldc, mode, ahead); break;
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
  }
}

// ---- the result as real: bias, GELU, rounding ----------------------------------------------------------------------

static inline void round_row(real *to, const float *c) {
#if PAIRS
  for (int j = 0; j < NR; j += LANES) {
    __m256i h = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(c + j));
    memcpy(to + j, &h, sizeof h);
  }
#else
  for (int j = 0; j < NR; j++) to[j] = store(c[j]);
#endif
}

// Finishes the values c (rows of NR, `cols` of them real) of the result at (i, j). Constant `cols` makes copies moves.
static inline __attribute__((always_inline)) void finish_rows(const Gemm *g, float *c, int64_t i, int64_t j,
                                                              int64_t rows, const int64_t cols) {
  float bias[NR] = {0};
  real out[NR];
  if (g->bias) {
    for (int64_t q = 0; q < cols; q++) bias[q] = load(g->bias[j + q]);
  }
  for (int64_t r = 0; r < rows; r++, c += NR) {
    int64_t at = (i + r) * g->ldc + j;
    for (int q = 0; q < NR; q++) c[q] += bias[q];
    if (g->gelu) {  // of the rounded value, so that GELU of a kept `pre` gives the same bits later
      round_row(out, c);
      if (g->pre) memcpy(g->pre + at, out, sizeof(real) * (size_t)cols);
      for (int q = 0; q < NR; q++) c[q] = vgelu(load(out[q]));
    }
    round_row(out, c);
    memcpy(g->y + at, out, sizeof(real) * (size_t)cols);
  }
}

static void finish(const Gemm *g, float *c, int64_t i, int64_t j, int64_t rows, int64_t cols) {
  if (cols == NR) finish_rows(g, c, i, j, rows, NR);
  else finish_rows(g, c, i, j, rows, cols);
}

// ---- one round: an outer block of the result and a block of k ------------------------------------------------------

// One side of the product: the rows of A or the columns of B, cut into panels.
typedef struct {
  const real *p;
  int64_t ld;
  int along_k;   // an element's neighbours in memory are neighbours in k
  int64_t size;  // rows or columns
  int most;      // of a panel: MR or NR
  int width;     // stride of a packed panel: AR or NR
} Side;

typedef struct {
  const Gemm *g;
  const Side *shared, *streamed;
  int64_t s0, s_size, t0, t_size;  // the outer block: its part of the shared and of the streamed side
  int64_t k0, k, n_units;
  int32_t *shared_pack;
  float *sum;                      // where sums stand between blocks of k: the block's first element
  int64_t ld_sum;
  int plain;                       // nothing but sums is written: float result, or not the last block of k
  Mode mode;                       // of writing them
} Round;

// First row or column of panel q of a block of `size`. Rows are spread evenly, as a short last panel wastes loads of B;
// columns are not, as a short panel costs as much as a whole one.
static inline int64_t panel_begin(const Side *s, int64_t size, int64_t q) {
  return s->most == NR ? least(q * NR, size) : size * q / ceil_div(size, MR);
}

// Packs panels [first, end) of the block of `size` rows or columns that starts at `begin`, elements [k0, k0 + k) of k.
static void pack(const Side *s, int32_t *dst, int64_t begin, int64_t size, int64_t first, int64_t end, int64_t k0,
                 int64_t k) {
  for (int64_t q = first; q < end; q++, dst += s->width * ceil_div(k, KPU)) {
    int64_t at = begin + panel_begin(s, size, q), past = begin + panel_begin(s, size, q + 1);
    for (int h = 0; h < s->width && at + h < past; h += LANES) {
      const real *p = s->p + (s->along_k ? (at + h) * s->ld + k0 : k0 * s->ld + at + h);
      pack_lanes(dst + h, s->width, p, s->ld, s->along_k, s->size - at - h, k);
    }
  }
}

// The lines that packing streamed panels [first, end) will read, to be fetched in `slices` portions.
static Ahead source_of(const Round *r, int64_t first, int64_t end, int64_t slices) {
  const Side *s = r->streamed;
  int64_t from = panel_begin(s, r->t_size, first), size = (int64_t)sizeof(real);
  int64_t across = panel_begin(s, r->t_size, end) - from;
  int64_t run = s->along_k ? r->k : across, runs = s->along_k ? across : r->k, at = r->t0 + from;
  const real *p = s->p + (s->along_k ? at * s->ld + r->k0 : r->k0 * s->ld + at);
  return (Ahead){(const char *)p, s->ld * size, run * size, 0, runs, ceil_div(runs * ceil_div(run * size, 64), slices)};
}

// One tile from multiply to memory, at (i, j) of the outer block, whose first element is at (i0, j0) of the result.
static void tile_at(const Round *r, const int32_t *a, const int32_t *b, int64_t i0, int64_t j0, int64_t i, int64_t j,
                    int64_t rows, int64_t cols, Ahead *ahead) {
  float *sum = r->sum + i * r->ld_sum + j, c[MR * NR] __attribute__((aligned(64)));
  if (r->plain && cols == NR) {
    tile(rows, r->n_units, (const float *)a, (const float *)b, sum, r->ld_sum, r->mode, ahead);
    return;
  }
  tile(rows, r->n_units, (const float *)a, (const float *)b, c, NR, WRITE, ahead);
  for (int64_t q = 0; r->mode == ADD && q < rows; q++) {
    for (int64_t l = 0; l < cols; l++) c[q * NR + l] += sum[q * r->ld_sum + l];
  }
  if (!r->plain) {
    finish(r->g, c, i0 + i, j0 + j, rows, cols);
    return;
  }
  for (int64_t q = 0; q < rows; q++) memcpy(sum + q * r->ld_sum, c + q * NR, sizeof(float) * (size_t)cols);
}

// All tiles of streamed panels [first, end), packed in `chunk`, with all shared panels.
static void multiply_chunk(const Round *r, const int32_t *chunk, int64_t first, int64_t end, Ahead *ahead) {
  const Side *shared = r->shared, *streamed = r->streamed;
  for (int64_t p = 0; p < ceil_div(r->s_size, shared->most); p++) {
    int64_t s = panel_begin(shared, r->s_size, p), s_count = panel_begin(shared, r->s_size, p + 1) - s;
    const int32_t *sp = r->shared_pack + p * shared->width * r->n_units;
    for (int64_t q = first; q < end; q++) {
      int64_t t = panel_begin(streamed, r->t_size, q), t_count = panel_begin(streamed, r->t_size, q + 1) - t;
      const int32_t *tp = chunk + (q - first) * streamed->width * r->n_units;
      if (streamed->most == NR) tile_at(r, sp, tp, r->s0, r->t0, s, t, s_count, t_count, ahead);
      else tile_at(r, tp, sp, r->t0, r->s0, t, s, t_count, s_count, ahead);
    }
  }
}

// ---- blocking ------------------------------------------------------------------------------------------------------

typedef struct {
  int a_shared;
  int64_t k_block;                     // elements of k
  int64_t shared_block, stream_block;  // rows or columns of an outer block
  int64_t chunk_panels;
  int64_t shared_bytes, sum_bytes, chunk_bytes;
} Blocking;

// `size` in equal parts of at most `most`, rounded up to a multiple.
static int64_t even_block(int64_t size, int64_t most, int64_t multiple) {
  return ceil_div(ceil_div(size, ceil_div(size, most)), multiple) * multiple;
}

static Blocking blocking(int64_t m, int64_t n, int64_t k, int as_sum) {
  Blocking b = {.a_shared = m <= n, .k_block = even_block(k, K_UNITS * KPU, KPU)};
  int64_t n_units = b.k_block / KPU, a_panel = AR * n_units * 4, b_panel = NR * n_units * 4;
  int64_t shared = b.a_shared ? m : n, streamed = b.a_shared ? n : m;
  b.shared_block = even_block(shared, SHARED, NR);
  b.stream_block = k <= b.k_block ? streamed : even_block(streamed, STREAMED, NR);
  int64_t shared_panels = ceil_div(least(shared, b.shared_block), b.a_shared ? MR : NR);
  int64_t stream_panels = ceil_div(streamed, b.a_shared ? NR : MR);
  int64_t panel = b.a_shared ? b_panel : a_panel, fit = CHUNK_BYTES / panel;
  b.chunk_panels = least(fit > 1 ? fit : 1, stream_panels);
  b.shared_bytes = ceil_div(shared_panels * (b.a_shared ? a_panel : b_panel), 64) * 64;
  b.chunk_bytes = ceil_div(b.chunk_panels * panel, 64) * 64;
  int in_result = as_sum || !HG_BF16 || k <= b.k_block;
  b.sum_bytes = in_result ? 0 : ceil_div(b.shared_block * b.stream_block * 4, 64) * 64;
  return b;
}

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int as_sum, int64_t threads) {
  Blocking b = blocking(m, n, k, as_sum);
  return b.shared_bytes + b.sum_bytes + threads * b.chunk_bytes;
}

static Round round_at(const Gemm *g, const Blocking *b, const Side *shared, const Side *streamed, int64_t s0,
                      int64_t t0, int64_t k0) {
  Round r = {.g = g, .shared = shared, .streamed = streamed, .s0 = s0, .t0 = t0, .k0 = k0, .shared_pack = g->scratch};
  r.s_size = least(b->shared_block, shared->size - s0);
  r.t_size = least(b->stream_block, streamed->size - t0);
  r.k = least(b->k_block, g->k - k0);
  r.n_units = ceil_div(r.k, KPU);
  if (b->sum_bytes) {
    r.sum = (float *)((char *)g->scratch + b->shared_bytes);
    r.ld_sum = b->a_shared ? b->stream_block : b->shared_block;
  } else if (g->sum || !HG_BF16) {
    r.sum = (g->sum ? g->sum : (float *)g->y) + (b->a_shared ? s0 * g->ldc + t0 : t0 * g->ldc + s0);
    r.ld_sum = g->ldc;
  }
  int rounded = g->y && (HG_BF16 || g->bias || g->gelu), aligned = (uintptr_t)r.sum % 64 == 0 && g->ldc % 16 == 0;
  int pays = g->sum && aligned && b->k_block >= g->k && g->m * g->n * 4 >= STREAM_BYTES;
  r.plain = !rounded || k0 + r.k < g->k;
  r.mode = k0 > 0 || (g->sum && g->accumulate) ? ADD : pays ? STREAM : WRITE;
  return r;
}

// How far a round has come. Threads claim work instead of having it dealt out, and wait for packed panels, not for one
// another, so a thread that another program holds up (or a slower core) delays nobody until the very end.
typedef struct {
  int64_t claimed_shared, packed_shared, claimed_streamed;  // panels
} Progress;

// Adds to a counter; its value before. What a thread wrote before is seen by who reads the new value.
static inline int64_t advance(int64_t *counter, int64_t step) {
  return __atomic_fetch_add(counter, step, __ATOMIC_ACQ_REL);
}

static void run_round(const Round *r, Progress *progress, int32_t *chunk, int64_t chunk_panels) {
  const Side *shared = r->shared, *streamed = r->streamed;
  int64_t shared_panels = ceil_div(r->s_size, shared->most), panels = ceil_div(r->t_size, streamed->most);
  int64_t p;
  while ((p = advance(&progress->claimed_shared, 1)) < shared_panels) {
    pack(shared, r->shared_pack + p * shared->width * r->n_units, r->s0, r->s_size, p, p + 1, r->k0, r->k);
    advance(&progress->packed_shared, 1);
  }
  while (__atomic_load_n(&progress->packed_shared, __ATOMIC_ACQUIRE) < shared_panels) sched_yield();

  // Chunks are smaller where panels are few, so that there is something left to claim.
  int64_t step = least(chunk_panels, ceil_div(panels, 6 * hg_team()));
  int64_t next = advance(&progress->claimed_streamed, step);
  while (next < panels) {
    int64_t first = next, end = least(first + step, panels);
    Ahead ahead = {0};
    next = advance(&progress->claimed_streamed, step);
    if (next < panels) {
      int64_t slices = shared_panels * (end - first) * ceil_div(r->n_units, SLICE);
      ahead = source_of(r, next, least(next + step, panels), slices);
    }
    pack(streamed, chunk, r->t0, r->t_size, first, end, r->k0, r->k);
    multiply_chunk(r, chunk, first, end, &ahead);
  }
}

static void multiply(const Gemm *g, int64_t threads) {
  Side a = {g->a, g->lda, !g->a_trans, g->m, MR, AR}, b = {g->b, g->ldb, g->b_trans, g->n, NR, NR};
  Blocking bl = blocking(g->m, g->n, g->k, g->sum != NULL);
  const Side *shared = bl.a_shared ? &a : &b, *streamed = bl.a_shared ? &b : &a;
  char *chunks = (char *)g->scratch + bl.shared_bytes + bl.sum_bytes;
  Progress progress[2] = {{0, 0, 0}, {0, 0, 0}};  // of this round, and of the next, set back to 0 meanwhile
  (void)threads;

#pragma omp parallel num_threads((int)threads) if (threads > 1)
  {
    int32_t *chunk = (int32_t *)(chunks + hg_thread() * bl.chunk_bytes);
    int64_t rounds = 0;
    for (int64_t s0 = 0; s0 < shared->size; s0 += bl.shared_block) {
      for (int64_t t0 = 0; t0 < streamed->size; t0 += bl.stream_block) {
        for (int64_t k0 = 0; k0 < g->k; k0 += bl.k_block, rounds++) {
          if (rounds > 0) {
#pragma omp barrier
          }
          if (hg_thread() == 0) progress[(rounds + 1) % 2] = (Progress){0, 0, 0};
          Round r = round_at(g, &bl, shared, streamed, s0, t0, k0);
          run_round(&r, &progress[rounds % 2], chunk, bl.chunk_panels);
        }
      }
    }
#if defined(__AVX2__)
    _mm_sfence();  // streamed results are visible before the region ends
#endif
  }
}

// ---- up to DOT_ROWS rows of A: dot products straight from memory ---------------------------------------------------

// c[i * NR + j] = row i of A dot row j of B (stored (n, k)), for `rows` rows, a constant, and 4 rows of B at once.
static inline __attribute__((always_inline)) void dots(const int rows, const Gemm *g, const real *b, int64_t count,
                                                       float *c) {
  vec sum[DOT_ROWS][4];
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < 4; j++) sum[i][j] = (vec){0};
  }
  for (int64_t k = 0; k < g->k; k += LANES * KPU) {
    int64_t left = g->k - k;
    vec bv[4];
    for (int j = 0; j < 4; j++) {
      const real *p = b + (j < count ? j : 0) * g->ldb + k;
      bv[j] = (vec)load_along_k(p, left);
      __builtin_prefetch(p + 4 * g->ldb, 0, 2);  // the next four rows
    }
    for (int i = 0; i < rows; i++) {
      vec av = (vec)load_along_k(g->a + i * g->lda + k, left);
      for (int j = 0; j < 4; j++) sum[i][j] = multiply_add(sum[i][j], av, bv[j]);
    }
  }
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < count; j++) {
      float lanes[LANES], total = 0.0f;
      memcpy(lanes, &sum[i][j], sizeof lanes);
      for (int l = 0; l < LANES; l++) total += lanes[l];
      c[i * NR + j] = total;
    }
  }
}

static void multiply_dots(const Gemm *g, int64_t threads) {
  (void)threads;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
  for (int64_t j = 0; j < g->n; j += NR) {
    int64_t cols = least(NR, g->n - j);
    float c[DOT_ROWS * NR];
    for (int64_t q = 0; q < cols; q += 4) {
      const real *b = g->b + (j + q) * g->ldb;
      int64_t count = least(4, cols - q);
      if (g->m == 1) dots(1, g, b, count, c + q);
      else if (g->m == 2) dots(2, g, b, count, c + q);
      else if (g->m == 3) dots(3, g, b, count, c + q);
      else dots(4, g, b, count, c + q);
    }
    finish(g, c, 0, j, g->m, cols);
  }
}

void gemm(const Gemm *g) {
  int64_t threads = (double)g->m * (double)g->n * (double)g->k < SMALL ? 1 : least(g->threads, hg_threads());
  if (g->m <= DOT_ROWS && g->y && !g->a_trans && g->b_trans) multiply_dots(g, threads);
  else multiply(g, threads);
}
