// Chapter 2: the GPT-2 of chapter 1 in C: data, forward, backward, AdamW, training, sampling. One file, no library.
//
//     cc -O3 -march=native -fopenmp learn/02_gpt2.c -o gpt2 -lm
//     ./gpt2                                        trains on Shakespeare by letters, then samples
//     ./gpt2 --model gpt2_124M.bin --data train_000000.bin --lr 1e-4      starts from these weights, on tokens
//     ./gpt2 --help
//
//     cc -O3 -fopenmp -DREAL=double learn/02_gpt2.c -o gpt2_double -lm
//     ./gpt2_double --check                         compares every gradient with finite differences
//
// The formulas are those of chapter 1, repeated above each function. New is what numpy hid:
//
//   memory    Which buffer holds which numbers, and for how long. We allocate everything once, before the first step.
//   order     A processor computes faster than its memory delivers. Of two loops that compute the same sums, the faster
//             one reuses a number while it is still in the cache.
//   threads   Two threads must never add to the same number. So we split each loop where threads share no output.
//
// Letters: B sequences of T tokens make N = B*T rows of C channels; H heads of D = C/H channels; L layers; V tokens in
// the vocabulary, R rows in its padded table. `dx` always means d loss / d x and has the shape of x. Arrays are
// row-major, as in numpy: x (N, C) keeps row n, channel c at x[n * C + c].

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>  // exp(x) is expf(x) where x is a float, and so on
#include <time.h>

#undef I  // tgmath.h defines it as the imaginary unit; here it is the number of inputs

#ifndef REAL
#define REAL float
#endif
typedef REAL real;  // float to train; double to check gradients, which needs more than float's seven digits

// ---- basics ---------------------------------------------------------------------------------------------------------

// Ends the program with a message for the user: the rule, and what was found instead.
static void fail(const char *message, ...) {
  va_list arguments;
  va_start(arguments, message);
  vfprintf(stderr, message, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  exit(2);
}

// Zeroed memory for `count` elements of `size` bytes.
static void *zeros(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) fail("[memory] %.1f MiB are needed, but the system has none left", (double)count * size / 1048576);
  return memory;
}

static real *reals(size_t count) { return zeros(count, sizeof(real)); }

static uint64_t random_state;

// A random number between 0 and 1, both excluded. A counter grows by an odd constant, and mixing its bits makes the
// results look unrelated (the splitmix64 generator).
static double uniform(void) {
  random_state += 0x9E3779B97F4A7C15u;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return ((double)(z >> 11) + 0.5) * 0x1p-53;
}

// A normally distributed random number with mean 0 and this standard deviation: a coordinate of a point at a random
// angle, at a distance r whose distribution makes the density of points e^(-r^2/2) (Box and Muller).
static double normal(double deviation) {
  double radius = sqrt(-2 * log(uniform()));
  return deviation * radius * cos(2 * M_PI * uniform());
}

// a . b, over n numbers. `simd` lets the compiler reorder the sum: eight partial sums, for example, instead of one.
static real dot(const real *a, const real *b, int n) {
  real sum = 0;
  #pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// y += s x, over n numbers.
static void add_scaled(real *y, real s, const real *x, int n) {
  #pragma omp simd
  for (int i = 0; i < n; i++) y[i] += s * x[i];
}

// ---- the layers, each with its backward -----------------------------------------------------------------------------
//
// Arguments: outputs, inputs, sizes. A backward overwrites the gradient of its input unless its comment says that it
// adds, and always adds to the gradients of parameters, which `backward` sets to zero first.

// y = x W' + b.   x: (N, I), W: (O, I), b: (O) or NULL -> y: (N, O)
//
// This function and its backward take nine tenths of all time. W is large and read once: row o of W comes from memory
// and stays in L1 while it is multiplied with every row of x. x is small and stays in L2. Four rows of x at a time
// share each load of W and give four independent sums.
static void linear(real *y, const real *x, const real *w, const real *b, int N, int I, int O) {
  #pragma omp parallel for
  for (int o = 0; o < O; o++) {  // each thread has its own columns of y
    const real *wo = w + (size_t)o * I;
    real bo = b ? b[o] : 0;
    int n = 0;
    for (; n + 4 <= N; n += 4) {
      const real *x0 = x + (size_t)n * I, *x1 = x0 + I, *x2 = x1 + I, *x3 = x2 + I;
      real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      #pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int i = 0; i < I; i++) {
        s0 += x0[i] * wo[i];
        s1 += x1[i] * wo[i];
        s2 += x2[i] * wo[i];
        s3 += x3[i] * wo[i];
      }
      real *yo = y + (size_t)n * O + o;
      yo[0] = s0 + bo, yo[O] = s1 + bo, yo[2 * (size_t)O] = s2 + bo, yo[3 * (size_t)O] = s3 + bo;
    }
    for (; n < N; n++) y[(size_t)n * O + o] = dot(x + (size_t)n * I, wo, I) + bo;
  }
}

// y_no = sum_i x_ni W_oi + b_o.   Nudging x_ni moves y_no by W_oi, for every o:   dx_ni = sum_o dy_no W_oi
//                                 Nudging W_oi moves y_no by x_ni, for every n:   dW_oi = sum_n dy_no x_ni
//                                 Nudging b_o  moves y_no by 1, for every n:      db_o  = sum_n dy_no
//
// Both are sums of whole rows, so add_scaled computes both, with contiguous accesses only.
static void linear_backward(real *dx, real *dw, real *db, const real *dy, const real *x, const real *w, int N, int I,
                            int O) {
  enum { ROWS = 8 };  // of dx, which stay in cache while all of W passes by
  #pragma omp parallel for
  for (int first = 0; first < N; first += ROWS) {  // each thread has its own rows of dx
    int last = first + ROWS < N ? first + ROWS : N;
    memset(dx + (size_t)first * I, 0, (size_t)(last - first) * I * sizeof(real));
    for (int o = 0; o < O; o++)
      for (int n = first; n < last; n++) add_scaled(dx + (size_t)n * I, dy[(size_t)n * O + o], w + (size_t)o * I, I);
  }
  #pragma omp parallel for
  for (int o = 0; o < O; o++) {  // each thread has its own rows of dW
    for (int n = 0; n < N; n++) {
      add_scaled(dw + (size_t)o * I, dy[(size_t)n * O + o], x + (size_t)n * I, I);
      if (db) db[o] += dy[(size_t)n * O + o];
    }
  }
}

// y = n w + b with n = (x - mean) rstd and rstd = 1 / sqrt(mean((x - mean)^2) + 1e-5), the means over the C channels of
// each row.   x: (N, C) -> n, y: (N, C), rstd: (N)
static void layernorm(real *y, real *n, real *rstd, const real *x, const real *w, const real *b, int N, int C) {
  #pragma omp parallel for
  for (int row = 0; row < N; row++) {
    const real *xr = x + (size_t)row * C;
    real *nr = n + (size_t)row * C, *yr = y + (size_t)row * C;
    real mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += xr[c] / C;
    for (int c = 0; c < C; c++) variance += (xr[c] - mean) * (xr[c] - mean) / C;
    rstd[row] = 1 / sqrt(variance + (real)1e-5);
    for (int c = 0; c < C; c++) {
      nr[c] = (xr[c] - mean) * rstd[row];
      yr[c] = nr[c] * w[c] + b[c];
    }
  }
}

// With dn = dy w, and <> the mean over C:   dx = rstd (dn - <dn> - n <dn n>),   dw = sum over rows of dy n,
// db = sum over rows of dy.
//
// Why: n does not change when x moves along the all-ones vector (only the mean changes) or along n (only the deviation
// changes). So the gradient has no component in these two directions. Adds it to dx, which already holds the gradient
// that bypasses the branch (see `block`).
static void layernorm_backward(real *dx, real *dw, real *db, const real *dy, const real *n, const real *rstd,
                               const real *w, int N, int C) {
  #pragma omp parallel for
  for (int row = 0; row < N; row++) {
    const real *dyr = dy + (size_t)row * C, *nr = n + (size_t)row * C;
    real mean = 0, mean_n = 0;
    for (int c = 0; c < C; c++) {
      mean += dyr[c] * w[c] / C;
      mean_n += dyr[c] * w[c] * nr[c] / C;
    }
    for (int c = 0; c < C; c++) dx[(size_t)row * C + c] += rstd[row] * (dyr[c] * w[c] - mean - nr[c] * mean_n);
  }
  // Here all rows add to the same C numbers. The work is small, so one thread does it, in order.
  for (int row = 0; row < N; row++) {
    for (int c = 0; c < C; c++) {
      dw[c] += dy[(size_t)row * C + c] * n[(size_t)row * C + c];
      db[c] += dy[(size_t)row * C + c];
    }
  }
}

// y = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), elementwise.
static void gelu(real *y, const real *x, size_t count) {
  const real k = sqrt(2 / M_PI), cubic = 0.044715;
  #pragma omp parallel for
  for (size_t i = 0; i < count; i++) y[i] = x[i] / 2 * (1 + tanh(k * (x[i] + cubic * x[i] * x[i] * x[i])));
}

// The product rule, and tanh' = 1 - tanh^2:   y' = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u',
// with u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2).   In place: dy becomes dx.
static void gelu_backward(real *dy, const real *x, size_t count) {
  const real k = sqrt(2 / M_PI), cubic = 0.044715;
  #pragma omp parallel for
  for (size_t i = 0; i < count; i++) {
    real th = tanh(k * (x[i] + cubic * x[i] * x[i] * x[i]));
    dy[i] *= (1 + th) / 2 + x[i] / 2 * (1 - th * th) * k * (1 + 3 * cubic * x[i] * x[i]);
  }
}

// o_t = sum_s p_ts v_s with p_t = softmax over s <= t of q_t . k_s / sqrt(D), in each sequence and head: token t
// compares its query q_t with all keys k_s so far, and takes a weighted mean of their values v_s.
// qkv: (B, T, 3, H, D) -> o: (B, T, H, D), p: (B, H, T, T), of which only s <= t is written and read
//
// Subtract the largest score before exp, which would overflow at 89; the subtraction cancels in the quotient.
static void attention(real *o, real *p, const real *qkv, int B, int T, int C, int H) {
  int D = C / H;
  real scale = 1 / sqrt((real)D);
  #pragma omp parallel for collapse(2)
  for (int b = 0; b < B; b++) {
    for (int h = 0; h < H; h++) {  // each thread has its own head of its own sequence
      const real *q = qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C;  // the next token is 3C further
      for (int t = 0; t < T; t++) {
        real *pt = p + (((size_t)b * H + h) * T + t) * T, *ot = o + ((size_t)b * T + t) * C + h * D;
        real top = -INFINITY, sum = 0;
        for (int s = 0; s <= t; s++) {
          pt[s] = scale * dot(q + (size_t)t * 3 * C, k + (size_t)s * 3 * C, D);
          if (pt[s] > top) top = pt[s];
        }
        for (int s = 0; s <= t; s++) sum += pt[s] = exp(pt[s] - top);
        memset(ot, 0, D * sizeof(real));
        for (int s = 0; s <= t; s++) add_scaled(ot, pt[s] /= sum, v + (size_t)s * 3 * C, D);
      }
    }
  }
}

// o_t = sum_s p_ts v_s gives   dv_s = sum_t p_ts do_t   and   dp_ts = do_t . v_s.
// The softmax p_s = e^z_s / sum e^z has dp_s/dz_r = p_s (1[s=r] - p_r), so   dz_s = p_s (dp_s - sum_r dp_r p_r).
// The score z_ts = q_t . k_s / sqrt(D) gives   dq_t = sum_s dz_ts k_s / sqrt(D)   and
// dk_s = sum_t dz_ts q_t / sqrt(D).
static void attention_backward(real *dqkv, const real *d_o, const real *p, const real *qkv, int B, int T, int C,
                               int H) {
  int D = C / H;
  real scale = 1 / sqrt((real)D);
  memset(dqkv, 0, (size_t)B * T * 3 * C * sizeof(real));
  #pragma omp parallel for collapse(2)
  for (int b = 0; b < B; b++) {
    for (int h = 0; h < H; h++) {  // dk and dv of a head are sums over t, so a thread needs a whole head
      size_t start = (size_t)b * T * 3 * C + h * D;
      const real *q = qkv + start, *k = q + C, *v = k + C;
      real *dq = dqkv + start, *dk = dq + C, *dv = dk + C;
      for (int t = 0; t < T; t++) {
        const real *pt = p + (((size_t)b * H + h) * T + t) * T, *do_t = d_o + ((size_t)b * T + t) * C + h * D;
        real dp[T], mean = 0;
        for (int s = 0; s <= t; s++) {
          dp[s] = dot(do_t, v + (size_t)s * 3 * C, D);
          mean += dp[s] * pt[s];
        }
        for (int s = 0; s <= t; s++) {
          real dz = pt[s] * (dp[s] - mean) * scale;
          add_scaled(dv + (size_t)s * 3 * C, pt[s], do_t, D);
          add_scaled(dq + (size_t)t * 3 * C, dz, k + (size_t)s * 3 * C, D);
          add_scaled(dk + (size_t)s * 3 * C, dz, q + (size_t)t * 3 * C, D);
        }
      }
    }
  }
}

// x[b,t] = wte[ids[b,t]] + wpe[t].   ids: (B, T) -> x: (N, C)
static void embed(real *x, const int *ids, const real *wte, const real *wpe, int B, int T, int C) {
  for (int n = 0; n < B * T; n++)
    for (int c = 0; c < C; c++) x[(size_t)n * C + c] = wte[(size_t)ids[n] * C + c] + wpe[(size_t)(n % T) * C + c];
}

// Forward copies row r of wte to every position that holds token r, so its gradient is the sum over those positions. It
// copies row t of wpe to position t of every sequence. Tokens repeat, so threads would collide: one thread does it all.
static void embed_backward(real *dwte, real *dwpe, const real *dx, const int *ids, int B, int T, int C) {
  for (int n = 0; n < B * T; n++) {
    add_scaled(dwte + (size_t)ids[n] * C, 1, dx + (size_t)n * C, C);
    add_scaled(dwpe + (size_t)(n % T) * C, 1, dx + (size_t)n * C, C);
  }
}

// Turns logits z = x wte' into probabilities p = softmax(z), in place; returns the mean over rows of -log p[target].
// z: (N, V) -> p: (N, V)
static double cross_entropy(real *z, const int *targets, int N, int V) {
  double losses[N], total = 0;
  #pragma omp parallel for
  for (int n = 0; n < N; n++) {
    real *zn = z + (size_t)n * V, top = zn[0], sum = 0;
    for (int i = 1; i < V; i++) top = zn[i] > top ? zn[i] : top;
    double target = zn[targets[n]] - top;
    for (int i = 0; i < V; i++) sum += zn[i] = exp(zn[i] - top);
    for (int i = 0; i < V; i++) zn[i] /= sum;
    losses[n] = log((double)sum) - target;  // not -log p, since p may underflow a float
  }
  for (int n = 0; n < N; n++) total += losses[n];  // not in the parallel loop: same order, same bits
  return total / N;
}

// -log p_t = log sum_j e^z_j - z_t, so its derivative in z_j is p_j - 1[j=t]; the mean divides by N.
// In place: p becomes dz.
static void cross_entropy_backward(real *p, const int *targets, int N, int V) {
  #pragma omp parallel for
  for (int n = 0; n < N; n++) {
    real *pn = p + (size_t)n * V;
    pn[targets[n]] -= 1;
    for (int i = 0; i < V; i++) pn[i] /= N;
  }
}

// ---- parameters -----------------------------------------------------------------------------------------------------

// One vector holds all parameters, in the order of a model file: tensor by tensor, and within a tensor layer by layer.
// Gradients and the optimizer's two moments are vectors of the same layout, so AdamW, the norm, reading and writing
// need not know what a parameter is for.
enum { WTE, WPE, LN1_W, LN1_B, QKV_W, QKV_B, PROJ_W, PROJ_B, LN2_W, LN2_B, FC_W, FC_B, OUT_W, OUT_B, LNF_W, LNF_B };
enum { TENSORS = LNF_B + 1 };
static const char *NAMES[TENSORS] = {"wte",    "wpe",    "ln_1 w", "ln_1 b", "qkv w", "qkv b", "proj w", "proj b",
                                     "ln_2 w", "ln_2 b", "fc w",   "fc b",   "out w", "out b", "ln_f w", "ln_f b"};

typedef struct {
  int T, V, L, H, C, R;  // longest sequence, tokens, layers, heads, channels, rows of wte
} Config;

typedef struct {
  Config config;
  size_t size[TENSORS];   // of one layer of a tensor
  size_t start[TENSORS];  // index of its layer 0
  int layers[TENSORS];    // 1 for tensors outside the blocks
  bool decays[TENSORS];   // whether weight decay applies: to matrices and tables, not to biases and norms
  size_t count;           // number of all parameters
  real *params, *grads, *m, *v;
} Model;

static Model new_model(Config c) {
  if (c.C % c.H) fail("[model] channels are a multiple of heads, but got %d and %d", c.C, c.H);
  size_t C = c.C;
  Model model = {
      .config = c,
      .size = {c.R * C, c.T * C, C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C, C, C},
  };
  for (int i = 0; i < TENSORS; i++) {
    bool outside = i == WTE || i == WPE || i == LNF_W || i == LNF_B;
    model.layers[i] = outside ? 1 : c.L;
    model.decays[i] = i == WTE || i == WPE || i == QKV_W || i == PROJ_W || i == FC_W || i == OUT_W;
    model.start[i] = model.count;
    model.count += model.size[i] * model.layers[i];
  }
  model.params = reals(model.count);
  return model;
}

// Allocates the three vectors that only training needs.
static void make_trainable(Model *model) {
  model->grads = reals(model->count);
  model->m = reals(model->count);
  model->v = reals(model->count);
}

// A layer of a tensor, and of its gradient.
static real *param(const Model *m, int tensor, int layer) {
  return m->params + m->start[tensor] + layer * m->size[tensor];
}
static real *grad(const Model *m, int tensor, int layer) {
  return m->grads + m->start[tensor] + layer * m->size[tensor];
}

// Fresh parameters: matrices normally distributed, biases 0, norm weights 1 and biases 0, padding rows 0.
//
// Every layer adds two branches to the residual stream. The last matrix of a branch gets a standard deviation smaller
// by sqrt(2L), so that the variance of the stream does not depend on the depth.
static void draw(Model *model) {
  Config c = model->config;
  for (int i = 0; i < TENSORS; i++) {
    size_t count = i == WTE ? (size_t)c.V * c.C : model->size[i] * model->layers[i];
    double deviation = i == PROJ_W || i == OUT_W ? 0.02 / sqrt(2.0 * c.L) : 0.02;
    for (size_t at = 0; at < count; at++) {
      bool is_one = i == LN1_W || i == LN2_W || i == LNF_W;
      model->params[model->start[i] + at] = model->decays[i] ? normal(deviation) : is_one;
    }
  }
}

// A model file: 256 int32, then every parameter as float32, in the order above.
//
//     header[0] 20240326   header[1] 3   header[2..7] longest sequence, V, L, H, C, R   the rest 0
enum { MODEL_MAGIC = 20240326, MODEL_VERSION = 3 };

static Model read_model(const char *path) {
  FILE *file = fopen(path, "rb");
  int32_t header[256];
  if (!file) fail("[model] --model is a file that can be read, but got '%s'", path);
  if (fread(header, 4, 256, file) != 256 || header[0] != MODEL_MAGIC || header[1] != MODEL_VERSION)
    fail("[model] %s begins with %d and %d, float32 weights of a GPT-2, but it does not", path, MODEL_MAGIC,
         MODEL_VERSION);
  Config c = {.T = header[2], .V = header[3], .L = header[4], .H = header[5], .C = header[6], .R = header[7]};
  if (c.T < 1 || c.V < 1 || c.L < 1 || c.H < 1 || c.C < 1 || c.R < c.V) fail("[model] %s has sizes below 1", path);
  Model model = new_model(c);
  for (size_t at = 0; at < model.count; at++) {
    float number;  // one by one, since `real` may be double; the C library buffers
    if (fread(&number, sizeof(float), 1, file) != 1)
      fail("[model] %s holds %zu parameters, but it ends after %zu", path, model.count, at);
    model.params[at] = number;
  }
  fclose(file);
  return model;
}

static void write_model(const Model *model, const char *path) {
  Config c = model->config;
  int32_t header[256] = {MODEL_MAGIC, MODEL_VERSION, c.T, c.V, c.L, c.H, c.C, c.R};
  FILE *file = fopen(path, "wb");
  bool is_written = file && fwrite(header, 4, 256, file) == 256;
  for (size_t at = 0; is_written && at < model->count; at++) {
    float number = model->params[at];
    is_written = fwrite(&number, sizeof(float), 1, file) == 1;
  }
  if (!is_written || fclose(file)) fail("[model] --save is a file that can be written, but got '%s'", path);
}

// ---- the model ------------------------------------------------------------------------------------------------------

// What forward saves for backward in each layer. Every buffer has N rows, so these, not the weights, take most memory.
typedef struct {
  real *n1, *rstd1, *y1;  // norm: (N, C), (N), (N, C)
  real *qkv, *p, *o;      // attention: (N, 3C), (B, H, T, T), (N, C)
  real *n2, *rstd2, *y2;  // norm
  real *u, *a;            // MLP before and after GELU: (N, 4C) both
} Layer;

// All buffers of a forward and a backward with at most N rows in sequences of at most T.
//
// x, the residual stream, needs no copy per layer: the norms save what their backward needs, and a sum needs nothing.
typedef struct {
  int N, T;
  Layer *layers;
  real *x, *branch;              // (N, C): the stream, and the branch that a layer adds to it
  real *nf, *rstdf, *yf;         // the last norm
  real *logits;                  // (N, V): logits, then probabilities, then gradients of logits
  real *dx, *dbranch, *d3, *d4;  // (N, C), (N, C), (N, 3C), (N, 4C): gradients, reused by every layer
} Buffers;

static Buffers new_buffers(Config c, int N, int T) {
  size_t rows = N, C = c.C;
  Buffers b = {.N = N, .T = T, .layers = zeros(c.L, sizeof(Layer))};
  for (int l = 0; l < c.L; l++) {
    b.layers[l] = (Layer){
        .n1 = reals(rows * C), .rstd1 = reals(rows), .y1 = reals(rows * C),
        .qkv = reals(rows * 3 * C), .p = reals(rows * c.H * T), .o = reals(rows * C),
        .n2 = reals(rows * C), .rstd2 = reals(rows), .y2 = reals(rows * C),
        .u = reals(rows * 4 * C), .a = reals(rows * 4 * C),
    };
  }
  b.x = reals(rows * C), b.branch = reals(rows * C);
  b.nf = reals(rows * C), b.rstdf = reals(rows), b.yf = reals(rows * C);
  b.logits = reals(rows * c.V);
  b.dx = reals(rows * C), b.dbranch = reals(rows * C), b.d3 = reals(rows * 3 * C), b.d4 = reals(rows * 4 * C);
  return b;
}

// x += attention(norm(x)), then x += mlp(norm(x)): a layer reads the residual stream and adds to it.
static void block(const Model *m, Buffers *f, int l, int B, int T) {
  Layer *s = &f->layers[l];
  int N = B * T, C = m->config.C;
  layernorm(s->y1, s->n1, s->rstd1, f->x, param(m, LN1_W, l), param(m, LN1_B, l), N, C);
  linear(s->qkv, s->y1, param(m, QKV_W, l), param(m, QKV_B, l), N, C, 3 * C);
  attention(s->o, s->p, s->qkv, B, T, C, m->config.H);
  linear(f->branch, s->o, param(m, PROJ_W, l), param(m, PROJ_B, l), N, C, C);
  add_scaled(f->x, 1, f->branch, N * C);

  layernorm(s->y2, s->n2, s->rstd2, f->x, param(m, LN2_W, l), param(m, LN2_B, l), N, C);
  linear(s->u, s->y2, param(m, FC_W, l), param(m, FC_B, l), N, C, 4 * C);
  gelu(s->a, s->u, (size_t)N * 4 * C);
  linear(f->branch, s->a, param(m, OUT_W, l), param(m, OUT_B, l), N, 4 * C, C);
  add_scaled(f->x, 1, f->branch, N * C);
}

// x + f(x): a sum passes its gradient to both terms. So f->dx, the gradient of the stream, enters each branch as it is,
// and the gradient that comes out of the branch's norm is added to it. The calls are those of `block` in reverse order,
// each replaced by its backward.
static void block_backward(const Model *m, Buffers *f, int l, int B, int T) {
  Layer *s = &f->layers[l];
  int N = B * T, C = m->config.C;
  linear_backward(f->d4, grad(m, OUT_W, l), grad(m, OUT_B, l), f->dx, s->a, param(m, OUT_W, l), N, 4 * C, C);
  gelu_backward(f->d4, s->u, (size_t)N * 4 * C);
  linear_backward(f->dbranch, grad(m, FC_W, l), grad(m, FC_B, l), f->d4, s->y2, param(m, FC_W, l), N, C, 4 * C);
  layernorm_backward(f->dx, grad(m, LN2_W, l), grad(m, LN2_B, l), f->dbranch, s->n2, s->rstd2, param(m, LN2_W, l),
                     N, C);

  linear_backward(f->dbranch, grad(m, PROJ_W, l), grad(m, PROJ_B, l), f->dx, s->o, param(m, PROJ_W, l), N, C, C);
  attention_backward(f->d3, f->dbranch, s->p, s->qkv, B, T, C, m->config.H);
  linear_backward(f->dbranch, grad(m, QKV_W, l), grad(m, QKV_B, l), f->d3, s->y1, param(m, QKV_W, l), N, C, 3 * C);
  layernorm_backward(f->dx, grad(m, LN1_W, l), grad(m, LN1_B, l), f->dbranch, s->n1, s->rstd1, param(m, LN1_W, l),
                     N, C);
}

// Leaves the logits of B sequences of T tokens in f->logits. With targets, turns them into probabilities and returns
// the mean loss in nats per token; without (NULL), returns 0.
static double forward(const Model *m, Buffers *f, const int *ids, const int *targets, int B, int T) {
  Config c = m->config;
  int longest = f->T < c.T ? f->T : c.T;
  if (B * T > f->N || T > longest)
    fail("[model] at most %d rows in sequences of %d fit, but got %d of %d", f->N, longest, B * T, T);
  embed(f->x, ids, param(m, WTE, 0), param(m, WPE, 0), B, T, c.C);
  for (int l = 0; l < c.L; l++) block(m, f, l, B, T);
  layernorm(f->yf, f->nf, f->rstdf, f->x, param(m, LNF_W, 0), param(m, LNF_B, 0), B * T, c.C);
  // The head shares the embedding's weights. It uses only V rows, so padding never becomes a token.
  linear(f->logits, f->yf, param(m, WTE, 0), NULL, B * T, c.C, c.V);
  return targets ? cross_entropy(f->logits, targets, B * T, c.V) : 0;
}

// After a forward with targets: leaves the gradient of the mean loss in m->grads.
static void backward(const Model *m, Buffers *f, const int *ids, const int *targets, int B, int T) {
  Config c = m->config;
  int N = B * T;
  memset(m->grads, 0, m->count * sizeof(real));
  memset(f->dx, 0, (size_t)N * c.C * sizeof(real));
  cross_entropy_backward(f->logits, targets, N, c.V);
  linear_backward(f->dbranch, grad(m, WTE, 0), NULL, f->logits, f->yf, param(m, WTE, 0), N, c.C, c.V);
  layernorm_backward(f->dx, grad(m, LNF_W, 0), grad(m, LNF_B, 0), f->dbranch, f->nf, f->rstdf, param(m, LNF_W, 0), N,
                     c.C);
  for (int l = c.L - 1; l >= 0; l--) block_backward(m, f, l, B, T);
  embed_backward(grad(m, WTE, 0), grad(m, WPE, 0), f->dx, ids, B, T, c.C);  // adds to the head's gradient in wte
}

// Compares, for every layer of every tensor p, the slope of the loss along a random direction r with gradient . r,
// where slope = (loss(p + e r) - loss(p - e r)) / 2e. Returns 0 if all agree within the precision of `real`.
static int check(void) {
  enum { B = 3, T = 8 };
  bool is_double = sizeof(real) == 8;
  double e = is_double ? 1e-5 : 1e-2, limit = is_double ? 1e-6 : 3e-2, worst = 0;
  Model model = new_model((Config){.T = T, .V = 11, .L = 2, .H = 2, .C = 12, .R = 16});
  make_trainable(&model);
  Buffers buffers = new_buffers(model.config, B * T, T);
  draw(&model);
  for (size_t at = 0; at < model.count; at++) model.params[at] += normal(0.2);  // zero biases would hide mistakes
  int ids[B * T], targets[B * T];
  for (int n = 0; n < B * T; n++) ids[n] = uniform() * 11, targets[n] = uniform() * 11;
  forward(&model, &buffers, ids, targets, B, T);
  backward(&model, &buffers, ids, targets, B, T);

  for (int i = 0; i < TENSORS; i++) {
    for (int l = 0; l < model.layers[i]; l++) {
      size_t size = model.size[i];
      real *p = param(&model, i, l), *g = grad(&model, i, l), direction[size], kept[size];
      double expected = 0, length = 0, losses[2];
      memcpy(kept, p, sizeof(kept));
      for (size_t at = 0; at < size; at++) {
        direction[at] = normal(1);
        expected += g[at] * direction[at];
        length += g[at] * g[at];
      }
      for (int side = 0; side < 2; side++) {
        for (size_t at = 0; at < size; at++) p[at] = kept[at] + (side ? -e : e) * direction[at];
        losses[side] = forward(&model, &buffers, ids, targets, B, T);
      }
      memcpy(p, kept, sizeof(kept));
      double error = fabs((losses[0] - losses[1]) / (2 * e) - expected) / sqrt(length);
      if (error > worst || isnan(error)) worst = error;  // isnan, because nothing compares greater than a NaN
      printf("%-8s layer %d   %.1e%s\n", NAMES[i], l, error, error <= limit ? "" : "   WRONG");
    }
  }
  printf("gradients: worst relative error %.1e, %s (at most %.0e)\n", worst, worst <= limit ? "pass" : "FAIL", limit);
  return !(worst <= limit);
}

// ---- training -------------------------------------------------------------------------------------------------------

// The norm of all gradients as one vector. If it exceeds `limit`, scales the gradients down to it, so that one bad
// batch cannot move the weights far.
static double clip(Model *model, double limit) {
  double squares = 0;  // in double, for a sum of a hundred million small numbers
  for (size_t at = 0; at < model->count; at++) squares += (double)model->grads[at] * model->grads[at];
  double norm = sqrt(squares);
  real scale = limit > 0 && norm > limit ? limit / (norm + 1e-6) : 1;
  for (size_t at = 0; at < model->count; at++) model->grads[at] *= scale;
  return norm;
}

// AdamW: moves each parameter against its gradient by about lr, and by less where the gradient keeps changing sign.
//
//     m <- b1 m + (1 - b1) g       running mean of the gradient
//     v <- b2 v + (1 - b2) g^2     running mean of its square
//     p <- p - lr decay p - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)
//
// Means that start at zero are too small by a factor of 1 - b^step; the division undoes that. step counts from 1.
static void adamw(Model *model, int step, real lr, real b1, real b2, real decay) {
  const real eps = 1e-8, size_m = 1 - pow((double)b1, step), size_v = 1 - pow((double)b2, step);
  for (int i = 0; i < TENSORS; i++) {
    size_t first = model->start[i], last = first + model->size[i] * model->layers[i];
    real pull = model->decays[i] ? lr * decay : 0;
    #pragma omp parallel for
    for (size_t at = first; at < last; at++) {
      real g = model->grads[at];
      real m = model->m[at] = b1 * model->m[at] + (1 - b1) * g;
      real v = model->v[at] = b2 * model->v[at] + (1 - b2) * g * g;
      model->params[at] -= pull * model->params[at] + lr * (m / size_m) / (sqrt(v / size_v) + eps);
    }
  }
}

// The learning rate of a step, counted from 1: linear up to `peak`, then half a cosine towards a tenth of it.
static double cosine(int step, int steps, double peak, int warmup) {
  if (step <= warmup) return peak * step / warmup;
  double way = (double)(step - 1 - warmup) / (steps - warmup);
  return peak * (0.1 + 0.9 * 0.5 * (1 + cos(M_PI * way)));
}

// ---- data -----------------------------------------------------------------------------------------------------------

enum { MOST_TOKENS = 1 << 30 };  // more than any vocabulary has, and its padded size still fits an int

// A text as token ids. In a plain text every byte is a token; ids follow the order of first use.
typedef struct {
  int *ids;
  long count;
  int vocab;                  // ids that occur: 0 .. vocab-1
  bool is_text;               // if so:
  unsigned char letter[256];  // the byte that a token stands for
} Tokens;

// A token shard: 256 int32, then the ids. [0] is 20240520 for 16-bit ids or 20240801 for 32-bit ids, [2] is their
// number. Any other file is read as a text.
static Tokens read_tokens(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) fail("[data] a text or a token shard can be read, but got '%s'", path);
  uint32_t header[256] = {0};
  size_t got = fread(header, 1, sizeof(header), file);
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  int width = header[0] == 20240520 ? 2 : header[0] == 20240801 ? 4 : 1;
  Tokens tokens = {.is_text = width == 1};
  long start = tokens.is_text ? 0 : (long)sizeof(header);
  tokens.count = (size - start) / width;
  if (!tokens.is_text && (got < sizeof(header) || tokens.count != (long)header[2] || (size - start) % width))
    fail("[data] %s holds %u tokens, by its header, but it has %ld bytes", path, header[2], size);
  tokens.ids = zeros(tokens.count, sizeof(int));
  int number[256];
  memset(number, -1, sizeof(number));
  fseek(file, start, SEEK_SET);
  for (long at = 0; at < tokens.count; at++) {
    uint32_t id = 0;  // little-endian: a narrow number lands in the low bytes
    if (fread(&id, width, 1, file) != 1) fail("[data] %s can be read to its end, but it cannot", path);
    if (id >= MOST_TOKENS) fail("[data] token ids lie below %d, but got %u", MOST_TOKENS, id);
    if (tokens.is_text && number[id] < 0) {
      number[id] = tokens.vocab;
      tokens.letter[tokens.vocab] = id;
    }
    tokens.ids[at] = tokens.is_text ? number[id] : (int)id;
    if (tokens.ids[at] >= tokens.vocab) tokens.vocab = tokens.ids[at] + 1;
  }
  fclose(file);
  return tokens;
}

// Sequences first, first+1, .. first+B-1 of the text, which is split into sequences of T tokens and repeats after the
// last. The targets are the same text shifted by one token.   -> ids, targets: (B, T)
static void batch(int *ids, int *targets, const Tokens *tokens, long first, int B, int T) {
  long pieces = (tokens->count - 1) / T;
  for (int b = 0; b < B; b++) {
    const int *piece = tokens->ids + (first + b) % pieces * T;
    memcpy(ids + (size_t)b * T, piece, T * sizeof(int));
    memcpy(targets + (size_t)b * T, piece + 1, T * sizeof(int));
  }
}

// The mean loss over the first `most` batches of a text, or over all if it has fewer.
static double evaluate(const Model *model, Buffers *buffers, const Tokens *tokens, int most, int B, int T) {
  int *ids = zeros((size_t)B * T, sizeof(int)), *targets = zeros((size_t)B * T, sizeof(int)), count = 0;
  double total = 0;
  for (; count < most && (long)(count + 1) * B <= (tokens->count - 1) / T; count++) {
    batch(ids, targets, tokens, (long)count * B, B, T);
    total += forward(model, buffers, ids, targets, B, T);
  }
  free(ids), free(targets);
  return total / count;
}

// ---- sampling -------------------------------------------------------------------------------------------------------

// Samples a token from softmax(z / temperature): stacks the probabilities, picks a random height, and returns the token
// at that height. Temperature 0 takes the most likely token.   z: (V), overwritten
static int draw_token(real *z, int V, double temperature) {
  int best = 0;
  for (int i = 1; i < V; i++) best = z[i] > z[best] ? i : best;
  if (temperature <= 0) return best;
  double top = z[best], sum = 0;
  for (int i = 0; i < V; i++) sum += z[i] = exp((z[i] - top) / temperature);
  double height = uniform() * sum;
  for (int i = 0; i < V; i++)
    if ((height -= z[i]) < 0) return i;
  return best;  // rounding may put the height just above the stack
}

// Prints `count` tokens that continue `start`: as letters if the tokens are letters, otherwise as numbers.
//
// Recomputes the whole text so far, at most T tokens, for every token. (Exercise 4 avoids that.)
static void sample(const Model *model, Buffers *f, const Tokens *tokens, int start, int count, double temperature) {
  int *text = zeros((size_t)count + 1, sizeof(int));
  int V = model->config.V, longest = f->T < model->config.T ? f->T : model->config.T;
  text[0] = start;
  for (int length = 1; length <= count; length++) {
    int T = length < longest ? length : longest;
    forward(model, f, text + length - T, NULL, 1, T);
    int id = text[length] = draw_token(f->logits + (size_t)(T - 1) * V, V, temperature);
    if (tokens->is_text && id < tokens->vocab) putchar(tokens->letter[id]);
    else printf("%d ", id);
    fflush(stdout);
  }
  putchar('\n');
  free(text);
}

// ---- the program ----------------------------------------------------------------------------------------------------

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// The settings, and the flags that set them.
static const char *data = "src/handgrad/data/shakespeare.txt", *val, *model_file, *save, *reference;
static int layers = 4, heads = 4, channels = 128, B = 12, T = 64;
static int steps = 300, warmup = 20, tokens_to_sample = 300, seed = 1;
static double lr = 1e-3, decay = 0.1, beta1 = 0.9, beta2 = 0.99, max_norm = 1.0, temperature = 0.8;

static const struct {
  const char *flag;
  const char **text;  // destination of the value, by type
  int *whole;
  double *number;
  const char *help;
} FLAGS[] = {
    {"--data", &data, 0, 0, "a token shard, or a text whose bytes become the tokens"},
    {"--val", &val, 0, 0, "the same for validation; default: the last tenth of a text"},
    {"--model", &model_file, 0, 0, "weights to start from (float32 .bin); default: fresh ones"},
    {"--save", &save, 0, 0, "file for the weights at the end"},
    {"--layers", 0, &layers, 0, "of a fresh model"},
    {"--heads", 0, &heads, 0, "of a fresh model"},
    {"--channels", 0, &channels, 0, "of a fresh model"},
    {"--batch", 0, &B, 0, "sequences per step"},
    {"--length", 0, &T, 0, "tokens per sequence"},
    {"--steps", 0, &steps, 0, "training steps"},
    {"--lr", 0, 0, &lr, "peak learning rate"},
    {"--warmup", 0, &warmup, 0, "steps from 0 to the peak"},
    {"--decay", 0, 0, &decay, "weight decay of matrices and tables"},
    {"--beta1", 0, 0, &beta1, "decay of the running mean of the gradient"},
    {"--beta2", 0, 0, &beta2, "decay of the running mean of its square"},
    {"--clip", 0, 0, &max_norm, "largest norm of the gradient; 0: no limit"},
    {"--sample", 0, &tokens_to_sample, 0, "tokens to write at the end"},
    {"--temperature", 0, 0, &temperature, "of the sample; 0: always the most likely token"},
    {"--seed", 0, &seed, 0, "seed of weights and sample"},
    {"--reference", &reference, 0, 0, "file of losses to compare with, one per line"},
};
enum { FLAG_COUNT = sizeof(FLAGS) / sizeof(FLAGS[0]) };

static void read_flags(int count, char **words) {
  for (int i = 1; i < count; i += 2) {
    int which = 0;
    while (which < FLAG_COUNT && strcmp(FLAGS[which].flag, words[i])) which++;
    if (which == FLAG_COUNT) fail("[flags] flags are those of --help, but got '%s'", words[i]);
    if (i + 1 == count) fail("[flags] %s takes a value, but got none", words[i]);
    char *value = words[i + 1], *end = value + strlen(value);
    if (FLAGS[which].text) *FLAGS[which].text = value;
    if (FLAGS[which].whole) *FLAGS[which].whole = strtol(value, &end, 10);
    if (FLAGS[which].number) *FLAGS[which].number = strtod(value, &end);
    if (end == value || *end) fail("[flags] %s takes a number, but got '%s'", words[i], value);
  }
  const int sizes[] = {layers, heads, channels, B, T, steps};
  for (int i = 0; i < 6; i++)
    if (sizes[i] < 1) fail("[flags] sizes are at least 1, but got %d", sizes[i]);
}

// Trains and prints steps. Returns the exit code: 1 if a loss differs from the reference by more than 1e-4.
static int train(Model *model, Buffers *buffers, const Tokens *tokens) {
  FILE *expected = reference ? fopen(reference, "r") : NULL;
  if (reference && !expected) fail("[train] --reference is a file that can be read, but got '%s'", reference);
  int *ids = zeros((size_t)B * T, sizeof(int)), *targets = zeros((size_t)B * T, sizeof(int)), compared = 0;
  double worst = 0, loss_there;
  make_trainable(model);
  for (int step = 1; step <= steps; step++) {
    double begin = seconds(), rate = cosine(step, steps, lr, warmup);
    batch(ids, targets, tokens, (long)(step - 1) * B, B, T);
    double loss = forward(model, buffers, ids, targets, B, T);
    backward(model, buffers, ids, targets, B, T);
    double norm = clip(model, max_norm);
    adamw(model, step, rate, beta1, beta2, decay);
    double ms = 1e3 * (seconds() - begin);
    bool is_shown = step % 20 == 0 || step == steps || expected;
    if (is_shown) printf("step %d/%d | loss %.6f | grad %.3f | lr %.1e | %.0f ms", step, steps, loss, norm, rate, ms);
    if (expected && fscanf(expected, "%lf", &loss_there) == 1) {
      double difference = fabs(loss - loss_there);
      if (difference > worst || isnan(difference)) worst = difference;
      printf(" | differs by %.1e", difference);
      compared++;
    }
    if (is_shown) putchar('\n');
    fflush(stdout);
  }
  free(ids), free(targets);
  if (!expected) return 0;
  fclose(expected);
  bool is_equal = compared == steps && worst <= 1e-4;
  printf("losses: worst difference %.1e in %d of %d steps, %s (at most 1e-04)\n", worst, compared, steps,
         is_equal ? "pass" : "FAIL");
  return !is_equal;
}

int main(int count, char **words) {
  if (count == 2 && !strcmp(words[1], "--help")) {
    printf("--check          compare every gradient with finite differences\n");
    for (int i = 0; i < FLAG_COUNT; i++) printf("%-16s %s\n", FLAGS[i].flag, FLAGS[i].help);
    return 0;
  }
  if (count == 2 && !strcmp(words[1], "--check")) return check();
  read_flags(count, words);
  random_state = seed;

  Tokens tokens = read_tokens(data), val_tokens = {0};
  if (val) {
    val_tokens = read_tokens(val);
  } else if (tokens.is_text) {
    val_tokens = tokens;
    tokens.count = tokens.count * 9 / 10;
    val_tokens.ids += tokens.count;
    val_tokens.count -= tokens.count;
  }
  if (tokens.count <= T) fail("[data] %s has more than %d tokens, but it has %ld", data, T, tokens.count);

  int V = tokens.is_text || tokens.vocab > 50257 ? tokens.vocab : 50257;  // a shard does not store it; GPT-2's is 50257
  Model model;
  if (model_file) {
    model = read_model(model_file);
  } else {
    // The table is padded to a multiple of 128 rows, which suits hardware. The padding stays 0 and is never used.
    model = new_model((Config){.T = T, .V = V, .L = layers, .H = heads, .C = channels, .R = (V + 127) / 128 * 128});
    draw(&model);
  }
  Config c = model.config;
  int largest = val_tokens.vocab > tokens.vocab ? val_tokens.vocab : tokens.vocab;
  if (largest > c.V) fail("[data] token ids lie below %d, but got %d", c.V, largest - 1);
  if (T > c.T) fail("[model] --length is at most %d, but got %d", c.T, T);
  Buffers buffers = new_buffers(c, B * T, T);
  printf("%zu parameters: %d layers, %d heads, %d channels, %d tokens\n", model.count, c.L, c.H, c.C, c.V);

  int code = train(&model, &buffers, &tokens);
  if (val_tokens.count > (long)B * T) printf("val loss %.4f\n", evaluate(&model, &buffers, &val_tokens, 20, B, T));
  if (save) write_model(&model, save);
  if (tokens_to_sample > 0) sample(&model, &buffers, &tokens, tokens.ids[0], tokens_to_sample, temperature);
  return code;
}

// ---- exercises ------------------------------------------------------------------------------------------------------
//
// After each, compile with -DREAL=double and run --check. Solutions: tests/test_learn.py.
//
// 1. Remove `- mean` from layernorm_backward. Which tensors keep right gradients? (In chapter 1 it was the other term.)
// 2. `a`, the MLP after GELU, can be recomputed from `u`. Free its N * 4C numbers in every layer: keep one buffer for
//    all layers and fill it when backward needs it. By what fraction does a layer's memory shrink, and what does it
//    cost?
// 3. Make one step from two half batches: two forwards and backwards whose gradients add up before one update (gradient
//    accumulation). Where must the memset of `backward` go, and what else must change so that the loss stays a mean?
// 4. `sample` recomputes the whole text for each token, although k and v of the earlier tokens do not change. Keep
//    them: write an attention for one new token against all cached keys. How many multiplications does a token then
//    cost?
