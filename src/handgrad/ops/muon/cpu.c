// muon: orthogonalises matrices and moves weights against them                                     math: README.md §2
// momentum  writes =  m, u: (n) f32
// muon      writes =  p: (count) dtype;  in bf16 low: (count) i16;  v: (s) f32, a mean square of each row or column
// numerics  f32, matrices in the working dtype; sums of squares in double;  bf16 without low: stochastic rounding
// layout    one matrix after the other; its steps are GEMMs, threads divide rows of the rest
// determinism  fixed order of sums for any number of threads
// source    after Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express), Li et al. 2025 (NorMuon)
#include "gemm.h"
#include "polynomials.h"
#include "weights.h"

ENTRY(muon_momentum) {
  float *restrict m = a->m, *restrict u = a->u;  // (n)
  const float *restrict grad = a->grad;          // (n)
  const StepScalars *scalars = a->scalars;
  int64_t n = a->n;
  float scale = scalars->grad_scale;
  float momentum = (float)scalars->momentum, rest = (float)(1.0 - scalars->momentum);
  if (scale == 0.0f) {  // the gradients are not finite
    memset(u, 0, sizeof(float) * (size_t)n);
    return;
  }
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; i++) {
    float g = grad[i] * scale;
    m[i] += rest * (g - m[i]);
    u[i] = g + momentum * (m[i] - g);
  }
}

typedef struct { real *x, *to, *gram, *poly; float *sums, *factors; void *gemm; } Room;

static const float steps[2][STEPS][3] = POLYNOMIALS;

static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static inline int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }
static inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The parts of scratch that begins at `at`; returns its bytes but for those of a GEMM.
static int64_t divide(Room *room, char *at, int64_t rows, int64_t N) {
  int64_t least = smaller(rows, N), whole = padded(rows * N * (int64_t)sizeof(real));
  int64_t square = padded(least * least * (int64_t)sizeof(real)), line = padded(larger(rows, N) * (int64_t)sizeof(float));
  char *grams = at + 2 * whole, *lines = grams + 2 * square;
  *room = (Room){.x = (real *)at, .to = (real *)(at + whole), .gram = (real *)grams, .poly = (real *)(grams + square),
                 .sums = (float *)lines, .factors = (float *)(lines + line), .gemm = lines + 2 * line};
  return 2 * (whole + square + line);
}

SCRATCH(muon)(int64_t N, int64_t rows, int64_t threads) {
  Room room;
  int64_t least = smaller(rows, N), most = larger(rows, N);
  int64_t gram = gemm_scratch(least, least, most, 0, threads), square = gemm_scratch(least, least, least, 0, threads);
  int64_t wide = gemm_scratch(rows, N, least, 0, threads), bytes = divide(&room, NULL, rows, N);
  return bytes + larger(larger(gram, square), wide);
}

// y (m, n) = a b, or with a transposed or b transposed; of a matrix with itself it is symmetric
static void multiply(real *y, const real *a, const real *b, int64_t m, int64_t n, int64_t k, int at, int bt,
                     const Room *room, int64_t threads) {
  gemm(&(Gemm){.m = m, .n = n, .k = k, .a = a, .lda = at ? m : k, .a_trans = at, .b = b, .ldb = bt ? k : n, .b_trans = bt,
               .y = y, .ldc = n, .threads = threads, .scratch = room->gemm, .symmetric = a == b});
}

// room.x = u (rows, N), divided by its norm and a margin; row_scale: rows get the same norm first.
static void prepare(const Room *room, const float *u, int64_t rows, int64_t N, int polynomial, int row_scale) {
  static const float margins[] = MARGINS, eps[] = NORM_EPS;
  double whole = 0.0;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < N; j++) sum += (double)u[i * N + j] * (double)u[i * N + j];
    room->sums[i] = (float)sqrt(sum);
  }
  for (int64_t i = 0; i < rows; i++) {
    room->factors[i] = row_scale ? 1.0f / fmaxf(room->sums[i], TINY_ROW) : 1.0f;
    double norm = (double)room->sums[i] * (double)room->factors[i];
    whole += norm * norm;
  }
  float scale = 1.0f / (margins[polynomial] * (float)sqrt(whole) + eps[polynomial]);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    float factor = room->factors[i] * scale;
    for (int64_t j = 0; j < N; j++) room->x[i * N + j] = store(u[i * N + j] * factor);
  }
}

// room.x = nearly its orthogonal factor: x (a + b x'x + c (x'x)^2) five times, or with x x' from the left where it is wide.
static void orthogonalise(Room *room, int64_t rows, int64_t N, int polynomial, int64_t threads) {
  int tall = rows > N;
  int64_t least = tall ? N : rows, most = tall ? rows : N;
  for (int s = 0; s < STEPS; s++) {
    real *gram = room->gram, *poly = room->poly;
    float c0 = steps[polynomial][s][0], c1 = steps[polynomial][s][1], c2 = steps[polynomial][s][2];
    multiply(gram, room->x, room->x, least, least, most, tall, !tall, room, threads);
    multiply(poly, gram, gram, least, least, least, 0, 0, room, threads);
#pragma omp parallel for schedule(static) if (least > 64)
    for (int64_t i = 0; i < least; i++) {
      for (int64_t j = 0; j < least; j++) {
        float diagonal = i == j ? c0 : 0.0f;
        poly[i * least + j] = store(diagonal + c1 * load(gram[i * least + j]) + c2 * load(poly[i * least + j]));
      }
    }
    if (tall) multiply(room->to, room->x, poly, rows, N, N, 0, 0, room, threads);
    else multiply(room->to, poly, room->x, rows, N, rows, 0, 0, room, threads);
    real *x = room->x;
    room->x = room->to;
    room->to = x;
  }
}

// room.sums = the squares of room.x, summed over each row, or over each column where it is wide.
static void squares(const Room *room, int64_t rows, int64_t N) {
  const real *x = room->x;
  float *sums = room->sums;
  if (rows >= N) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < N; j++) sum += load(x[i * N + j]) * load(x[i * N + j]);
      sums[i] = sum;
    }
    return;
  }
  enum { COLS = 128 };
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < N; from += COLS) {
    int64_t to = from + COLS < N ? from + COLS : N;
    for (int64_t j = from; j < to; j++) sums[j] = 0.0f;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = from; j < to; j++) sums[j] += load(x[i * N + j]) * load(x[i * N + j]);
  }
}

// room.factors: what the rows of room.x (its columns where it is wide) are multiplied with; v (or NULL) is moved.
static void even_out(const Room *room, float *v, int64_t rows, int64_t N, int rescale, double beta2) {
  int64_t lines = larger(rows, N), least = smaller(rows, N);
  double total = 0.0, after = 0.0;
  squares(room, rows, N);
  for (int64_t i = 0; i < lines; i++) total += (double)room->sums[i];
  double norm = sqrt(total), factor = rescale ? sqrt((double)least) / fmax(norm, (double)TINY) : 1.0;
  if (!v) {
    for (int64_t i = 0; i < lines; i++) room->factors[i] = (float)factor;
    return;
  }
  for (int64_t i = 0; i < lines; i++) {
    double sum = factor * factor * (double)room->sums[i];
    v[i] += (float)(1.0 - beta2) * ((float)(sum / (double)least) - v[i]);
    room->factors[i] = 1.0f / sqrtf(fmaxf(v[i], TINY));
    after += sum * (double)room->factors[i] * (double)room->factors[i];
  }
  double same = factor * factor * norm / fmax(sqrt(after), (double)TINY);
  for (int64_t i = 0; i < lines; i++) room->factors[i] *= (float)same;
}

// Elements from .. from + n - 1 of room.x, times their factors if `even`.
static void directions(float *o, const Room *room, int even, int64_t rows, int64_t N, int64_t from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) o[i] = load(room->x[from + i]);
  if (!even) return;
  int64_t row = from / N, column = from % N;
  for (int64_t i = 0; i < n; i++) {
    o[i] *= room->factors[rows >= N ? row : column];
    if (++column == N) column = 0, row++;
  }
}

ENTRY(muon) {
  real *p = a->p;         // (count) or NULL
  int16_t *low = a->low;  // (count) or NULL
  float *v = a->v;        // (s) or NULL
  const float *u = a->u;  // (R, N)
  const StepScalars *scalars = a->scalars;
  int64_t rows = a->rows, N = a->N, size = rows * N, first = a->first;
  int even = a->rescale || v;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  float rate = scalars->lr * (float)a->scale, shrink = scalars->lr * (float)a->weight_decay;
  Room room;
  divide(&room, a->scratch, rows, N);
  for (int64_t k = 0; k < a->R / rows; k++) {
    prepare(&room, u + k * size, rows, N, (int)a->polynomial, (int)a->row_scale);
    orthogonalise(&room, rows, N, (int)a->polynomial, a->threads);
    if (even) even_out(&room, v ? v + k * larger(rows, N) : NULL, rows, N, (int)a->rescale, a->beta2);
    int64_t begin = larger(first, k * size), end = smaller(first + a->count, (k + 1) * size);  // of p, in the stack
#pragma omp parallel for schedule(static)
    for (int64_t from = begin; from < end; from += WEIGHTS) {
      int64_t n = smaller(WEIGHTS, end - from), at = from - first;
      float buffer[WEIGHTS], o[WEIGHTS], *restrict w = load_weights(buffer, p + at, low ? low + at : NULL, n);
      directions(o, &room, even, rows, N, from - k * size, n);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        float decay = a->cautious && o[i] * w[i] < 0.0f ? 0.0f : shrink;
        w[i] = w[i] - decay * w[i] - rate * o[i];
      }
      store_weights(p + at, low ? low + at : NULL, w, a->start + at, n, scalars);
    }
  }
}
