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
// of NR columns, k outermost inside a panel. A packed element is a `unit` of 4 bytes: one float, or with vdpbf16ps two
// bf16 neighbours in k, which one instruction multiplies and adds. Without that instruction bf16 becomes float here.
//
// The smaller operand (by rows of A against columns of B) is packed once, by all threads, and is shared. The larger one
// is cut into chunks of a few panels; a thread packs a chunk for itself, right before it multiplies it with all shared
// panels, so a chunk is read from memory once and stays in the thread's own cache.
//
// k is cut into blocks of at most K_UNITS; between blocks sums are kept as float, in the result or in scratch. A sum
// runs over k in one fixed order, and threads share out panels only, so their number never changes a bit.
//
// source  own work after Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", TOMS 2008
#include "gemm.h"
#include "vmath.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, MR = 14, NV = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, MR = 6, NV = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, MR = 8, NV = 3 };
#else
enum { LANES = 4, MR = 4, NV = 2 };
#endif
#if HG_BF16 && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
enum {
  NR = NV * LANES,
  AR = (MR + LANES - 1) / LANES * LANES,  // stride of a packed A panel: MR rounded up to whole vectors
  KPU = PAIRS ? 2 : 1,                    // elements of k in a unit
  K_UNITS = 768,                          // a B panel of a block of k: 768 * 32 * 4 = 96 KiB of a 1 MiB L2
  CHUNK_A = 8, CHUNK_B = 4,               // panels of a private chunk: 8 * 48 or 4 * 96 = 384 KiB
  SHARED = 2048, STREAMED = 4096,         // rows or columns of an outer block; they bound the scratch
};

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t units __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- packing -------------------------------------------------------------------------------------------------------

// Four units of LANES / 4 rows: lane group g holds row 4 g. Rows are `ld` bytes apart.
static inline units four_units(const char *p, int64_t ld) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 4 * ld)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 8 * ld)), 2);
  return (units)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 12 * ld)), 3);
#elif defined(__AVX2__)
  return (units)_mm256_loadu2_m128i((const __m128i *)(p + 4 * ld), (const __m128i *)p);
#else
  (void)ld;
  units v;
  memcpy(&v, p, sizeof v);
  return v;
#endif
}

// dst[u * stride + i] = unit u of row i, for a block of LANES x LANES units; rows are `ld` bytes apart. Loading by quarters puts every unit into its
// lane group at once (as fast as a copy), so only the 4 x 4 transposes inside the groups are left: two rounds of unpack.
static inline void transpose(int32_t *dst, int stride, const void *src, int64_t ld) {
#if __has_builtin(__builtin_shuffle)
  units low1, high1, low2, high2;
  for (int l = 0; l < LANES; l++) {
    int at = l / 4 * 4, other = l & 1 ? LANES : 0, from = l & 2 ? LANES : 0;
    low1[l] = other + at + l % 4 / 2;
    high1[l] = other + at + 2 + l % 4 / 2;
    low2[l] = from + at + l % 2;
    high2[l] = from + at + 2 + l % 2;
  }
#pragma GCC unroll 4
  for (int s = 0; s < LANES; s += 4) {
    const char *p = (const char *)src + 4 * s;
    units r0 = four_units(p, ld), r1 = four_units(p + ld, ld);
    units r2 = four_units(p + 2 * ld, ld), r3 = four_units(p + 3 * ld, ld);
    units a = __builtin_shuffle(r0, r1, low1), b = __builtin_shuffle(r0, r1, high1);
    units c = __builtin_shuffle(r2, r3, low1), d = __builtin_shuffle(r2, r3, high1);
    units column[4] = {__builtin_shuffle(a, c, low2), __builtin_shuffle(a, c, high2), __builtin_shuffle(b, d, low2),
                       __builtin_shuffle(b, d, high2)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) memcpy(dst + (s + i) * stride, &column[i], sizeof(units));
  }
#else
  for (int u = 0; u < LANES; u++) {
    for (int i = 0; i < LANES; i++) memcpy(dst + u * stride + i, (const char *)src + i * ld + 4 * u, 4);
  }
#endif
}

// One unit of each of LANES neighbours that lie side by side in memory; the next element of k is at p + ld.
static inline units load_across(const real *p, int64_t ld, int64_t left) {
#if HG_BF16
  halves h;
  memcpy(&h, p, sizeof h);
  words v = __builtin_convertvector(h, words);
  if (!PAIRS) return (units)(v << 16);
  if (left < 2) return (units)v;
  memcpy(&h, p + ld, sizeof h);
  return (units)(v | __builtin_convertvector(h, words) << 16);
#else
  (void)ld, (void)left;
  units v;
  memcpy(&v, p, sizeof v);
  return v;
#endif
}

// Element i of k as it goes into a unit.
static inline void put(void *unit, int64_t i, real v) {
#if PAIRS
  memcpy((char *)unit + 2 * i, &v, 2);
#else
  float f = load(v);
  memcpy((char *)unit + 4 * i, &f, 4);
#endif
}

// Packs LANES neighbours (rows of A or columns of B): unit u of neighbour i goes to dst[u * stride + i]. `along_k`: a
// neighbour's elements lie side by side and neighbours are ld apart; otherwise the other way round. Only `room`
// neighbours exist; the lanes of others hold anything, their sums are never kept. An odd last pair of k is filled with 0.
static void pack_lanes(int32_t *dst, int stride, const real *src, int64_t ld, int along_k, int64_t room, int64_t k) {
  int64_t n_units = ceil_div(k, KPU), count = least(room, LANES);
  if (along_k) {
    for (int64_t u = 0; u < n_units; u += LANES) {
      const real *p = src + u * KPU;
      int64_t left = least(k - u * KPU, LANES * KPU);
      if ((PAIRS || !HG_BF16) && count == LANES && left == LANES * KPU) {
        transpose(dst + u * stride, stride, p, ld * (int64_t)sizeof(real));
        continue;
      }
      int32_t block[LANES][LANES], across[LANES][LANES];
      memset(block, 0, sizeof block);
      for (int64_t i = 0; i < count; i++) {
        for (int64_t q = 0; q < left; q++) put(block[i], q, p[i * ld + q]);
      }
      transpose(across[0], LANES, block, sizeof block[0]);
      for (int64_t i = 0; i < least(n_units - u, LANES); i++) memcpy(dst + (u + i) * stride, across[i], sizeof across[i]);
    }
  } else if (count == LANES) {
    for (int64_t u = 0; u < n_units; u++) {
      units v = load_across(src + u * KPU * ld, ld, k - u * KPU);
      memcpy(dst + u * stride, &v, sizeof v);
    }
  } else {
    for (int64_t u = 0; u < n_units; u++) {
      for (int64_t i = 0; i < count; i++) {
        int32_t unit = 0;
        for (int64_t q = 0; q < least(KPU, k - u * KPU); q++) put(&unit, q, src[(u * KPU + q) * ld + i]);
        dst[u * stride + i] = unit;
      }
    }
  }
}

// ---- the tile ------------------------------------------------------------------------------------------------------

static inline vec multiply_add(vec sum, float a, vec b) {
#if PAIRS
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#else
  return sum + a * b;
#endif
}

// Source lines of the thread's next chunk, asked for while it computes this one: a few every SLICE steps of k, so that they
// neither wait for memory when they are packed nor crowd out the loads of the tile.
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

// c(rows, NR) = or += panel of A * panel of B. `rows` is a constant after inlining, so the sums live in registers.
static inline __attribute__((always_inline)) void tile_rows(const int rows, int64_t n_units, const float *a, const float *b,
                                                            float *c, int64_t ldc, int add, Ahead *ahead) {
  vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = (vec){0};
    __builtin_prefetch(c + i * ldc);
    __builtin_prefetch(c + i * ldc + NR / 2);
  }
  for (int64_t done = 0; done < n_units; done += SLICE) {
    fetch_ahead(ahead);
    for (int64_t u = least(SLICE, n_units - done); u > 0; u--) {
      vec bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) memcpy(&bv[j], b + j * LANES, sizeof(vec));
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = multiply_add(sum[i][j], a[i], bv[j]);
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
    for (int j = 0; j < NV; j++) {
      float *to = c + i * ldc + j * LANES;
      if (add) {
        vec old;
        memcpy(&old, to, sizeof old);
        sum[i][j] += old;
      }
      memcpy(to, &sum[i][j], sizeof(vec));
    }
  }
}

static void tile(int64_t rows, int64_t n_units, const float *a, const float *b, float *c, int64_t ldc, int add,
                 Ahead *ahead) {
#define ROWS(r) case r: tile_rows(r <= MR ? r : MR, n_units, a, b, c, ldc, add, ahead); break;
  switch (rows) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
  }
}

// ---- what happens to a finished tile -------------------------------------------------------------------------------

// Where sums stand between blocks of k, and whether they can go there straight from the registers.
typedef struct {
  const Gemm *g;
  float *sum;     // of the outer block's first element
  int64_t ld;
  int has_sum;    // earlier blocks of k (or the caller) have left sums to add to
  int last;       // this is the last block of k: bias, GELU, rounding
} Finish;

// Tile values (rows, cols) at row i, column j of the result: adds what was there, then bias, then GELU.
static inline __attribute__((always_inline)) void finish_tile(const Finish *f, float *c, const float *sum, int64_t i, int64_t j,
                                                              int64_t rows, const int64_t cols) {
  const Gemm *g = f->g;
  float bias[NR] = {0};
  if (g->bias) for (int64_t q = 0; q < cols; q++) bias[q] = load(g->bias[j + q]);
  for (int64_t r = 0; r < rows; r++, c += NR, sum += f->ld) {
    if (f->has_sum) for (int64_t q = 0; q < cols; q++) c[q] += sum[q];
    for (int64_t q = 0; q < cols; q++) c[q] += bias[q];
    int64_t at = (i + r) * g->ldc + j;
    if (g->pre) for (int64_t q = 0; q < cols; q++) g->pre[at + q] = store(c[q]);
    if (g->gelu) for (int64_t q = 0; q < cols; q++) c[q] = vgelu(c[q]);
    for (int64_t q = 0; q < cols; q++) g->y[at + q] = store(c[q]);
  }
}

// One tile from multiply to memory; (i, j) counts from the result's origin, (si, sj) from the outer block's.
static void tile_at(const Finish *f, int64_t n_units, const int32_t *a, const int32_t *b, int64_t i, int64_t j, int64_t si,
                    int64_t sj, int64_t rows, int64_t cols, Ahead *ahead) {
  float *sum = f->sum + si * f->ld + sj;
  int plain = f->g->sum || !f->last || (!HG_BF16 && !f->g->bias && !f->g->pre && !f->g->gelu);
  if (plain && cols == NR) {
    tile(rows, n_units, (const float *)a, (const float *)b, sum, f->ld, f->has_sum, ahead);
    return;
  }
  float c[MR * NR] __attribute__((aligned(64)));
  tile(rows, n_units, (const float *)a, (const float *)b, c, NR, 0, ahead);
  if (!plain) {
    if (cols == NR) finish_tile(f, c, sum, i, j, rows, NR);
    else finish_tile(f, c, sum, i, j, rows, cols);
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t q = 0; q < cols; q++) sum[r * f->ld + q] = c[r * NR + q] + (f->has_sum ? sum[r * f->ld + q] : 0.0f);
  }
}

// ---- blocking ------------------------------------------------------------------------------------------------------

// One side of the product: the rows of A or the columns of B, cut into panels of equal height (within one row).
typedef struct {
  const real *p;
  int64_t ld;
  int along_k;     // an element's neighbours in memory are neighbours in k
  int64_t size;    // rows or columns
  int most;        // of a panel: MR or NR
  int width;       // stride of a packed panel: AR or NR
} Side;

// First row or column of panel q of a block of `size`. Rows are spread evenly, as a short last panel wastes broadcasts;
// columns are not, as a short panel costs a whole one.
static inline int64_t panel_begin(const Side *s, int64_t size, int64_t q) {
  return s->most == NR ? least(q * NR, size) : size * q / ceil_div(size, MR);
}

// Packs panels [first, end) of the block of `size` rows or columns that starts at `begin`, elements [k0, k0 + k) of k.
static void pack(const Side *s, int32_t *dst, int64_t begin, int64_t size, int64_t first, int64_t end, int64_t k0, int64_t k) {
  int64_t n_units = ceil_div(k, KPU);
  for (int64_t q = first; q < end; q++, dst += s->width * n_units) {
    int64_t at = begin + panel_begin(s, size, q), past = begin + panel_begin(s, size, q + 1);
    for (int h = 0; h < s->width && at + h < past; h += LANES) {
      const real *p = s->p + (s->along_k ? (at + h) * s->ld + k0 : k0 * s->ld + at + h);
      pack_lanes(dst + h, s->width, p, s->ld, s->along_k, s->size - at - h, k);
    }
  }
}

// The lines that packing rows or columns [begin, end) will read, to be fetched in `slices` portions.
static Ahead source_of(const Side *s, int64_t begin, int64_t end, int64_t k0, int64_t k, int64_t slices) {
  int64_t size = (int64_t)sizeof(real), run = s->along_k ? k : end - begin, runs = s->along_k ? end - begin : k;
  const real *p = s->p + (s->along_k ? begin * s->ld + k0 : k0 * s->ld + begin);
  return (Ahead){(const char *)p, s->ld * size, run * size, 0, runs, ceil_div(runs * ceil_div(run * size, 64), slices)};
}

typedef struct {
  int64_t k_block;                   // elements of k
  int64_t shared_block, stream_block;  // rows or columns
  int64_t shared_bytes, sum_bytes, chunk_bytes;
} Blocking;

static int64_t even_block(int64_t size, int64_t most, int64_t multiple) {
  int64_t blocks = ceil_div(size, most);
  return ceil_div(ceil_div(size, blocks), multiple) * multiple;
}

static Blocking blocking(int64_t m, int64_t n, int64_t k, int as_sum) {
  int a_shared = m <= n;
  int64_t shared = a_shared ? m : n, streamed = a_shared ? n : m;
  Blocking b;
  b.k_block = even_block(k, K_UNITS * KPU, KPU);
  b.shared_block = even_block(shared, SHARED, NR);
  b.stream_block = even_block(streamed, STREAMED, NR);
  int64_t n_units = b.k_block / KPU, chunk = a_shared ? CHUNK_B * NR : CHUNK_A * AR;
  int64_t shared_width = a_shared ? ceil_div(least(m, b.shared_block), MR) * AR : ceil_div(least(n, b.shared_block), NR) * NR;
  int64_t all_streamed = a_shared ? ceil_div(n, NR) * NR : ceil_div(m, MR) * AR;
  b.shared_bytes = shared_width * n_units * 4;
  b.chunk_bytes = ceil_div(least(chunk, all_streamed) * n_units * 4, 64) * 64;
  int in_result = as_sum || !HG_BF16 || k <= b.k_block;
  b.sum_bytes = in_result ? 0 : ceil_div(b.shared_block * b.stream_block * 4, 64) * 64;
  return b;
}

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int as_sum, int64_t threads) {
  if (m <= 0 || n <= 0 || k <= 0) return 0;
  Blocking b = blocking(m, n, k, as_sum);
  return b.shared_bytes + b.sum_bytes + threads * b.chunk_bytes;
}

// All tiles of streamed panels [first, end) with all shared panels.
static void multiply_chunk(const Finish *f, const Side *shared, const Side *streamed, const int32_t *shared_pack,
                           const int32_t *chunk, int64_t s0, int64_t s_size, int64_t t0, int64_t t_size, int64_t first,
                           int64_t end, int64_t n_units, Ahead *ahead) {
  int64_t panels = ceil_div(s_size, shared->most);
  for (int64_t p = 0; p < panels; p++) {
    int64_t s = panel_begin(shared, s_size, p), s_count = panel_begin(shared, s_size, p + 1) - s;
    const int32_t *sp = shared_pack + p * shared->width * n_units;
    for (int64_t q = first; q < end; q++) {
      int64_t t = panel_begin(streamed, t_size, q), t_count = panel_begin(streamed, t_size, q + 1) - t;
      const int32_t *tp = chunk + (q - first) * streamed->width * n_units;
      if (streamed->most == NR) tile_at(f, n_units, sp, tp, s0 + s, t0 + t, s, t, s_count, t_count, ahead);
      else tile_at(f, n_units, tp, sp, t0 + t, s0 + s, t, s, t_count, s_count, ahead);
    }
  }
}

void gemm(const Gemm *g) {
  if (g->m <= 0 || g->n <= 0 || g->k <= 0) return;
  Side a = {g->a, g->lda, !g->a_trans, g->m, MR, AR}, b = {g->b, g->ldb, g->b_trans, g->n, NR, NR};
  int a_shared = g->m <= g->n;
  const Side *shared = a_shared ? &a : &b, *streamed = a_shared ? &b : &a;
  Blocking bl = blocking(g->m, g->n, g->k, g->sum != NULL);
  int32_t *shared_pack = g->scratch;
  float *sums = (float *)((char *)g->scratch + bl.shared_bytes);
  char *chunks = (char *)sums + bl.sum_bytes;
  int sums_in_scratch = bl.sum_bytes > 0;
  int64_t threads = (double)g->m * (double)g->n * (double)g->k < 5e5 ? 1 : least(g->threads, hg_threads());

#pragma omp parallel num_threads((int)threads) if (threads > 1)
  {
    int32_t *chunk = (int32_t *)(chunks + hg_thread() * bl.chunk_bytes);
    for (int64_t s0 = 0; s0 < shared->size; s0 += bl.shared_block) {
      int64_t s_size = least(bl.shared_block, shared->size - s0), s_panels = ceil_div(s_size, shared->most);
      for (int64_t t0 = 0; t0 < streamed->size; t0 += bl.stream_block) {
        int64_t t_size = least(bl.stream_block, streamed->size - t0), t_panels = ceil_div(t_size, streamed->most);
        int64_t most = a_shared ? CHUNK_B : CHUNK_A;
        int64_t n_chunks = least(ceil_div(ceil_div(t_panels, most), hg_team()) * hg_team(), t_panels);
        for (int64_t k0 = 0; k0 < g->k; k0 += bl.k_block) {
          int64_t k = least(bl.k_block, g->k - k0), n_units = ceil_div(k, KPU);
          if (t0 == 0 || bl.k_block < g->k) {
#pragma omp for schedule(static)
            for (int64_t p = 0; p < s_panels; p++) {
              pack(shared, shared_pack + p * shared->width * n_units, s0, s_size, p, p + 1, k0, k);
            }
          }
          int64_t i0 = a_shared ? s0 : t0, j0 = a_shared ? t0 : s0;
          Finish f = {g, NULL, g->ldc, k0 > 0 || (g->sum && g->accumulate), k0 + k >= g->k};
          if (sums_in_scratch) {
            f.sum = sums;
            f.ld = a_shared ? bl.stream_block : bl.shared_block;
          } else {
            f.sum = g->sum ? g->sum + i0 * g->ldc + j0 : HG_BF16 ? NULL : (float *)g->y + i0 * g->ldc + j0;
          }
          for (int64_t c = hg_thread(); c < n_chunks; c += hg_team()) {
            int64_t first = t_panels * c / n_chunks, end = t_panels * (c + 1) / n_chunks;
            pack(streamed, chunk, t0, t_size, first, end, k0, k);
            Ahead ahead = {0};
            if (c + hg_team() < n_chunks) {
              int64_t next = c + hg_team();
              ahead = source_of(streamed, t0 + panel_begin(streamed, t_size, t_panels * next / n_chunks),
                                t0 + panel_begin(streamed, t_size, t_panels * (next + 1) / n_chunks), k0, k,
                                s_panels * (end - first) * ceil_div(n_units, SLICE));
            }
            multiply_chunk(&f, shared, streamed, shared_pack, chunk, s0, s_size, t0, t_size, first, end, n_units, &ahead);
          }
#pragma omp barrier
        }
      }
    }
  }
}
