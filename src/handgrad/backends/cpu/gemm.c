// gemm: a packed GEMM for one or a few cores        contract: gemm.h
//
// The inner kernel is a register tile of MR x NR sums (tile.h). Both operands are packed first, so that a tile reads
// them sequentially: A in panels of MR rows, B in panels of NR columns, k outermost inside a panel, in units of 4 bytes
// (pack.h).
//
// The smaller operand (by rows of A against columns of B) is shared: all threads pack it, once. The larger one is
// streamed in chunks of a few panels: a thread claims a chunk, packs it for itself, and multiplies it with all shared
// panels right away. So a chunk is read from memory once and stays in the thread's own L2. Meanwhile the thread
// prefetches the source lines of its next chunk.
//
// k is split into blocks of at most K_UNITS; between blocks the sums are kept as float, in the result or in scratch.
// Every sum runs over k in one fixed order and threads divide panels only, so results do not depend on their number.
//
// With up to DOT_ROWS rows of A (decoding) nothing is packed: B is read once, for dot products.
//
// source  own work after Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", TOMS 2008
#include "gemm.h"
#include "tile.h"
#include "vmath.h"
#include <sched.h>

enum {
  K_UNITS = 1024,            // a B panel of a block of k: 1024 * 32 * 4 = 128 KiB of a 1 MiB L2
  CHUNK_BYTES = 256 * 1024,  // of a packed chunk; about as many more are prefetched for the next one
  SHARED = 2048,             // most rows or columns of the shared operand in an outer block: bounds scratch
  STREAMED = 4096,           // the same of the streamed operand: bounds the sums kept between blocks of k
  DOT_ROWS = 4,
};
static const double SMALL = 5e5;             // multiply-adds; below this, waking threads costs more than it saves
static const double SMALL_READ = 5e4;        // elements of B; the same for dot products, whose time is that of reading B
static const int64_t STREAM_BYTES = 1 << 20; // a larger result is evicted from the caches before it is read

// ---- epilogue: bias, activation, rounding to real ------------------------------------------------------------------

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

// Bias, activation and rounding of c (rows, NR), whose first `cols` columns belong to the result, at (i, j). With a constant
// `cols` the copies become plain moves, with a constant `act` its loop vectorises.
static inline __attribute__((always_inline)) void epilogue_rows(const Gemm *g, float *c, int64_t i, int64_t j,
                                                                int64_t rows, const int64_t cols, const int act) {
  float bias[NR] = {0};
  real out[NR];
  if (g->bias) {
    for (int64_t q = 0; q < cols; q++) bias[q] = load(g->bias[j + q]);
  }
  for (int64_t r = 0; r < rows; r++, c += NR) {
    int64_t at = (i + r) * g->ldc + j;
    for (int64_t q = 0; g->addend && q < cols; q++) c[q] += load(g->addend[at + q]);
    for (int q = 0; q < NR; q++) c[q] += bias[q];
    if (act) {  // of the rounded value, so that recomputing y from a kept `pre` gives the same bits
      round_row(out, c);
      if (g->pre) memcpy(g->pre + at, out, sizeof(real) * (size_t)cols);
      for (int q = 0; q < NR; q++) c[q] = vact(load(out[q]), act);
    }
    round_row(out, c);
    memcpy(g->y + at, out, sizeof(real) * (size_t)cols);
  }
}

static void epilogue(const Gemm *g, float *c, int64_t i, int64_t j, int64_t rows, int64_t cols) {
  if (cols == NR) {
    EACH_ACT(g->act, epilogue_rows, g, c, i, j, rows, NR)
  } else {
    EACH_ACT(g->act, epilogue_rows, g, c, i, j, rows, cols)
  }
}

// ---- one round: an outer block of the result and a block of k ------------------------------------------------------

// One operand, split into panels: rows of A or columns of B.
typedef struct {
  const real *p;
  int64_t ld;
  int along_k;   // elements that are contiguous in memory are neighbours in k
  int64_t size;  // rows or columns
  int panel;     // rows or columns of a panel: MR or NR
  int stride;    // of a packed panel: AR or NR
} Operand;

typedef struct {
  const Gemm *g;
  const Operand *shared, *streamed;
  int64_t s0, s_size, t0, t_size;  // the outer block: its range of the shared and of the streamed operand
  int64_t k0, k, n_units;
  int32_t *shared_pack;
  float *sum;                      // where sums are kept between blocks of k: the outer block's first element
  int64_t ld_sum;
  int sums_only;                   // no epilogue: the result is float, or this is not the last block of k
  Mode mode;                       // how sums are stored
} Round;

// First row or column of panel q of a block of `size`. Rows are spread evenly, because a short last panel of A wastes
// loads of B; columns are not, because a short panel of B costs as much as a full one.
static inline int64_t panel_begin(const Operand *s, int64_t size, int64_t q) {
  return s->panel == NR ? least(q * NR, size) : size * q / ceil_div(size, MR);
}

// Packs panels [first, end) of the block of `size` rows or columns that starts at `begin`, elements [k0, k0 + k) of k.
static void pack(const Operand *s, int32_t *dst, int64_t begin, int64_t size, int64_t first, int64_t end, int64_t k0,
                 int64_t k) {
  for (int64_t q = first; q < end; q++, dst += s->stride * ceil_div(k, KPU)) {
    int64_t at = begin + panel_begin(s, size, q), past = begin + panel_begin(s, size, q + 1);
    for (int h = 0; h < s->stride && at + h < past; h += LANES) {
      const real *p = s->p + (s->along_k ? (at + h) * s->ld + k0 : k0 * s->ld + at + h);
      pack_lanes(dst + h, s->stride, p, s->ld, s->along_k, s->size - at - h, k);
    }
  }
}

// The source lines of streamed panels [first, end), to be prefetched in `slices` portions.
static Prefetch source_of(const Round *r, int64_t first, int64_t end, int64_t slices) {
  const Operand *s = r->streamed;
  int64_t from = panel_begin(s, r->t_size, first), size = (int64_t)sizeof(real);
  int64_t across = panel_begin(s, r->t_size, end) - from;
  int64_t run = s->along_k ? r->k : across, runs = s->along_k ? across : r->k, at = r->t0 + from;
  const real *p = s->p + (s->along_k ? at * s->ld + r->k0 : r->k0 * s->ld + at);
  int64_t lines = runs * ceil_div(run * size, 64);
  return (Prefetch){(const char *)p, s->ld * size, run * size, 0, runs, ceil_div(lines, slices)};
}

// Computes and stores one tile, at (i, j) of the outer block, which starts at (i0, j0) of the result.
static void tile_at(const Round *r, const int32_t *a, const int32_t *b, int64_t i0, int64_t j0, int64_t i, int64_t j,
                    int64_t rows, int64_t cols, Prefetch *prefetch) {
  float *sum = r->sum + i * r->ld_sum + j, c[MR * NR] __attribute__((aligned(64)));
  if (r->sums_only && cols == NR) {
    tile(rows, r->n_units, (const float *)a, (const float *)b, sum, r->ld_sum, r->mode, prefetch);
    return;
  }
  tile(rows, r->n_units, (const float *)a, (const float *)b, c, NR, WRITE, prefetch);
  for (int64_t q = 0; r->mode == ADD && q < rows; q++) {
    for (int64_t l = 0; l < cols; l++) c[q * NR + l] += sum[q * r->ld_sum + l];
  }
  if (!r->sums_only) {
    epilogue(r->g, c, i0 + i, j0 + j, rows, cols);
    return;
  }
  for (int64_t q = 0; q < rows; q++) memcpy(sum + q * r->ld_sum, c + q * NR, sizeof(float) * (size_t)cols);
}

// Computes all tiles of streamed panels [first, end), packed in `chunk`, with all shared panels; of a symmetric result
// none that lies above the diagonal.
static void multiply_chunk(const Round *r, const int32_t *chunk, int64_t first, int64_t end, Prefetch *prefetch) {
  const Operand *shared = r->shared, *streamed = r->streamed;
  for (int64_t p = 0; p < ceil_div(r->s_size, shared->panel); p++) {
    int64_t s = panel_begin(shared, r->s_size, p), s_count = panel_begin(shared, r->s_size, p + 1) - s;
    const int32_t *sp = r->shared_pack + p * shared->stride * r->n_units;
    for (int64_t q = first; q < end; q++) {
      int64_t t = panel_begin(streamed, r->t_size, q), t_count = panel_begin(streamed, r->t_size, q + 1) - t;
      const int32_t *tp = chunk + (q - first) * streamed->stride * r->n_units;
      int64_t last_row = (streamed->panel == NR ? r->s0 + s + s_count : r->t0 + t + t_count) - 1;
      if (r->g->symmetric && (streamed->panel == NR ? r->t0 + t : r->s0 + s) > last_row) continue;
      if (streamed->panel == NR) tile_at(r, sp, tp, r->s0, r->t0, s, t, s_count, t_count, prefetch);
      else tile_at(r, tp, sp, r->t0, r->s0, t, s, t_count, s_count, prefetch);
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

// The size of equal blocks of at most `most` that cover `size`, rounded up to a multiple.
static int64_t even_block(int64_t size, int64_t most, int64_t multiple) {
  return ceil_div(ceil_div(size, ceil_div(size, most)), multiple) * multiple;
}

static Blocking blocking(int64_t m, int64_t n, int64_t k, int to_sum) {
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
  int in_result = to_sum || !HG_BF16 || k <= b.k_block;
  b.sum_bytes = in_result ? 0 : ceil_div(b.shared_block * b.stream_block * 4, 64) * 64;
  return b;
}

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int to_sum, int64_t threads) {
  Blocking b = blocking(m, n, k, to_sum);
  return b.shared_bytes + b.sum_bytes + threads * b.chunk_bytes;
}

static Round round_at(const Gemm *g, const Blocking *b, const Operand *shared, const Operand *streamed, int64_t s0,
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
  int has_epilogue = g->y && (HG_BF16 || g->bias || g->addend || g->act);
  int aligned = (uintptr_t)r.sum % 64 == 0 && g->ldc % 16 == 0;
  int streams = g->sum && aligned && b->k_block >= g->k && g->m * g->n * 4 >= STREAM_BYTES;
  r.sums_only = !has_epilogue || k0 + r.k < g->k;
  r.mode = k0 > 0 || (g->sum && g->accumulate) ? ADD : streams ? STREAM : WRITE;
  return r;
}

// Progress of a round. Threads claim work dynamically and wait for packed panels, not for each other, so a preempted
// thread or a slower core delays the others only at the end of the round.
typedef struct {
  int64_t claimed_shared, packed_shared, claimed_streamed;  // panels
} Progress;

// Adds to a counter and returns its value before. Who reads the new value also sees what this thread wrote before.
static inline int64_t advance(int64_t *counter, int64_t step) {
  return __atomic_fetch_add(counter, step, __ATOMIC_ACQ_REL);
}

static void run_round(const Round *r, Progress *progress, int32_t *chunk, int64_t chunk_panels) {
  const Operand *shared = r->shared, *streamed = r->streamed;
  int64_t shared_panels = ceil_div(r->s_size, shared->panel), panels = ceil_div(r->t_size, streamed->panel);
  int64_t p;
  while ((p = advance(&progress->claimed_shared, 1)) < shared_panels) {
    pack(shared, r->shared_pack + p * shared->stride * r->n_units, r->s0, r->s_size, p, p + 1, r->k0, r->k);
    advance(&progress->packed_shared, 1);
  }
  while (__atomic_load_n(&progress->packed_shared, __ATOMIC_ACQUIRE) < shared_panels) sched_yield();

  // With few panels chunks are smaller, so that every thread finds some to claim.
  int64_t step = least(chunk_panels, ceil_div(panels, 6 * hg_num_threads()));
  int64_t next = advance(&progress->claimed_streamed, step);
  while (next < panels) {
    int64_t first = next, end = least(first + step, panels);
    Prefetch prefetch = {0};
    next = advance(&progress->claimed_streamed, step);
    if (next < panels) {
      int64_t slices = shared_panels * (end - first) * ceil_div(r->n_units, SLICE);
      prefetch = source_of(r, next, least(next + step, panels), slices);
    }
    pack(streamed, chunk, r->t0, r->t_size, first, end, r->k0, r->k);
    multiply_chunk(r, chunk, first, end, &prefetch);
  }
}

static void multiply(const Gemm *g, int64_t threads) {
  Operand a = {g->a, g->lda, !g->a_trans, g->m, MR, AR}, b = {g->b, g->ldb, g->b_trans, g->n, NR, NR};
  Blocking bl = blocking(g->m, g->n, g->k, g->sum != NULL);
  const Operand *shared = bl.a_shared ? &a : &b, *streamed = bl.a_shared ? &b : &a;
  char *chunks = (char *)g->scratch + bl.shared_bytes + bl.sum_bytes;
  Progress progress[2] = {{0, 0, 0}, {0, 0, 0}};  // of this round, and of the next, which is reset meanwhile
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
    _mm_sfence();  // makes non-temporal stores visible before the region ends
#endif
  }
}

// Copies what is below the diagonal of y (n, n) to its other side. Both sums add the same products in the same order.
static void mirror(const Gemm *g, int64_t threads) {
  enum { BLOCK = 32 };  // rows and columns: both sides fit into L1
  (void)threads;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads) if (threads > 1)
  for (int64_t i0 = 0; i0 < g->n; i0 += BLOCK) {
    for (int64_t j0 = 0; j0 <= i0; j0 += BLOCK) {
      for (int64_t i = i0; i < least(i0 + BLOCK, g->n); i++) {
        for (int64_t j = j0; j < least(j0 + BLOCK, i); j++) g->y[j * g->ldc + i] = g->y[i * g->ldc + j];
      }
    }
  }
}

// ---- up to DOT_ROWS rows of A: dot products without packing --------------------------------------------------------

// c[i * NR + j] = row i of A dot row j of B (stored (n, k)), for 4 rows of B at a time; `rows` is a constant.
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
    epilogue(g, c, 0, j, g->m, cols);
  }
}

void gemm(const Gemm *g) {
  int dots = g->m <= DOT_ROWS && g->y && !g->a_trans && g->b_trans;
  double work = dots ? (double)g->n * (double)g->k : (double)g->m * (double)g->n * (double)g->k;
  int64_t threads = work < (dots ? SMALL_READ : SMALL) ? 1 : least(g->threads, hg_max_threads());
  if (dots) multiply_dots(g, threads);
  else multiply(g, threads);
  if (g->symmetric) mirror(g, threads);
}
