// visible: which keys a query sees, and biases by distance. flash.h and cpu.c skip tiles that no query sees.
//                                                                                                 math: README.md §2
// source    own work; buckets after Raffel et al. 2020 (T5)
#pragma once

typedef struct {
  int64_t T, S, position;       // queries and keys of a sequence; position of its first query
  int64_t window;               // 0: none
  int causal;
  const int32_t *first_key, *last_key;  // (B T), or NULL
} View;

typedef struct { int64_t begin, end; } Range;  // begin .. end - 1

// The keys that a block of rows sees: some row sees one of `any`; if all BR rows exist, each sees all of `every`.
typedef struct { Range any, every; } RowsSee;

// Row r of a block of rows, of which n exist, sees keys from[r] .. to[r] - 1; start: the index of the first row among
// all B T.
static RowsSee rows_see(int32_t *from, int32_t *to, const View *v, int64_t start, int n) {
  RowsSee all = {{v->S, 0}, {0, n == BR ? v->S : 0}};
  int64_t at = v->position + start % v->T;
  for (int r = 0; r < n; r++, at++) {
    int64_t low = 0, high = v->S;
    if (v->causal && at + 1 < high) high = at + 1;
    if (v->window && at >= v->window) low = at + 1 - v->window;
    if (v->first_key && v->first_key[start + r] > low) low = v->first_key[start + r];
    if (v->last_key && v->last_key[start + r] + 1 < high) high = v->last_key[start + r] + 1;
    from[r] = (int32_t)low;
    to[r] = (int32_t)high;
    if (low < high && low < all.any.begin) all.any.begin = low;
    if (low < high && high > all.any.end) all.any.end = high;
    if (low > all.every.begin) all.every.begin = low;
    if (high < all.every.end) all.every.end = high;
  }
  for (int r = n; r < BR; r++) from[r] = to[r] = 0;
  return all;
}

// Of a pair of blocks: row r sees columns from[r] .. to[r] - 1, a tile of MR rows columns begin .. end - 1, and rows
// first .. stop - 1 include all that see a column of a tile of MR columns, and with `gaps` others in between. Rows that
// see nothing: from = to = BC.
typedef struct {
  int from[BR], to[BR], begin[BR / MR], end[BR / MR], first[BC / MR], stop[BC / MR], gaps;
} Seen;

static void seen_all(Seen *x) {
  memset(x, 0, sizeof *x);
  for (int r = 0; r < BR; r++) x->to[r] = BC;
  for (int i = 0; i < BR / MR; i++) x->end[i] = x->stop[i] = BC;
}

// keys: from column `key` on; n rows exist.
static void seen_part(Seen *x, const int32_t *from, const int32_t *to, int key, int n) {
  int end[BR];
  for (int r = 0; r < BR; r++) {
    int low = from[r] - key, high = to[r] - key;
    low = low < 0 ? 0 : low;
    high = high > BC ? BC : high;
    x->from[r] = low < high ? low : BC;
    x->to[r] = low < high ? high : BC;
    end[r] = low < high ? high : 0;
  }
  memset(x->first, 0, sizeof x->first);
  memset(x->stop, 0, sizeof x->stop);
  x->gaps = 0;
  for (int i = 0; i < BR / MR; i++) {
    int low = BC, high = 0, rows_end = smaller((i + 1) * MR, n);
    for (int r = i * MR; r < (i + 1) * MR; r++) {
      low = x->from[r] < low ? x->from[r] : low;
      high = end[r] > high ? end[r] : high;
    }
    x->begin[i] = low;
    x->end[i] = high;
    for (int j = low / MR; j * MR < high; j++) {
      if (x->stop[j] == 0) x->first[j] = i * MR;
      else x->gaps |= x->stop[j] < i * MR;
      x->stop[j] = rows_end;
    }
  }
}

// What rows see of the keys key .. key + BC - 1: of all pairs of blocks, or of this one, in `part`.
static const Seen *seen_columns(Seen *part, const Seen *all, RowsSee see, const int32_t *from, const int32_t *to,
                                int64_t key, int n) {
  if (see.every.begin <= key && key + BC <= see.every.end) return all;
  seen_part(part, from, to, (int)key, n);
  return part;
}

#define FAR 128  // distances from here on share a bucket

// The bucket of a distance n among `count`: exact below count / 2, then by its logarithm. Powers instead of logarithms:
// products of small whole numbers are exact, so that all engines agree on the borders.
static int distance_bucket(int n, int count) {
  int exact = count / 2, bucket = exact;
  double power = 1.0, bound = (double)FAR / exact;
  if (n < exact) return n;
  for (int i = exact; i < count; i++) power *= (double)n / exact;
  for (; bucket + 1 < count && power >= bound; bucket++) bound *= (double)FAR / exact;
  return bucket;
}

// bucket (2 FAR + 1): of the distances key - query from -FAR to FAR.
static void distance_buckets(int *bucket, int64_t R, int causal) {
  for (int d = -FAR; d <= FAR; d++) {
    int half = (int)R / 2, near = causal ? distance_bucket(d < 0 ? -d : 0, (int)R)
                                         : distance_bucket(d < 0 ? -d : d, half) + (d > 0 ? half : 0);
    bucket[d + FAR] = near;
  }
}

static inline int clamped(int64_t d) { return (int)(d < -FAR ? 0 : d > FAR ? 2 * FAR : d + FAR); }
