// adamw, adamw_bf16, adamw_int8: m, v, p from a gradient; decay is decoupled                       math: README.md §2
// writes =  p: (n) dtype;  in bf16 low: (n) i16, the low half of the float32 weight
//           m, v: (n) f32, or bf16, or codes of 8 bits with their scales: (n / 128) f32
// numerics  f32; bias corrections in double;  stochastic rounding, README.md §5: of moments, and of bf16 without low
// layout    one pass over flat vectors; threads divide blocks of elements
// source    after Loshchilov & Hutter 2019, algorithm 2; order of operations as in torch.optim.AdamW
#include "weights.h"

#define MOMENT_STREAM ((uint64_t)0xFFFE << 48)  // of random calls, the one before that of weights
#define SHARED 128                              // elements that share a scale

// rest: 1 - beta. rate, root: the bias-corrected learning rate and factor of sqrt(v). decay: 1 - lr * weight_decay.
typedef struct { float scale, beta1, rest1, beta2, rest2, rate, root, eps, decay; } Rule;

static inline Rule make_rule(const StepScalars *scalars, double beta1, double beta2, double eps, double weight_decay,
                             double factor) {
  double lr = scalars->lr, step = (double)(scalars->step - scalars->state_since);
  return (Rule){.scale = scalars->grad_scale, .beta1 = (float)beta1, .rest1 = (float)(1.0 - beta1),
                .beta2 = (float)beta2, .rest2 = (float)(1.0 - beta2),
                .rate = (float)(lr * factor / (1.0 - pow(beta1, step))),
                .root = (float)(1.0 / sqrt(1.0 - pow(beta2, step))), .eps = (float)eps,
                .decay = (float)(1.0 - lr * weight_decay)};
}

// Returns the new weight and updates the moments.
static inline float update(float weight, float *restrict m, float *restrict v, float grad, Rule r) {
  float g = grad * r.scale;
  *m = r.beta1 * *m + r.rest1 * g;
  *v = r.beta2 * *v + r.rest2 * (g * g);
  return r.decay * weight - r.rate * (*m / (sqrtf(*v) * r.root + r.eps));
}

ENTRY(adamw) {
  real *restrict p = a->p;                       // (n)
  float *restrict m = a->m, *restrict v = a->v;  // (n)
  int16_t *restrict low = a->low;                // (n) or NULL
  const float *restrict grad = a->grad;          // (n)
  const float *factor = a->factor;               // (1) or NULL
  int64_t n = a->n, start = a->start;            // start: the first element in the flat order of all parameters
  const StepScalars *scalars = a->scalars;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  Rule r = make_rule(scalars, a->beta1, a->beta2, a->eps, a->weight_decay, factor ? factor[0] : 1.0);
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) w[i] = update(w[i], m + from + i, v + from + i, grad[from + i], r);
    store_weights(p + from, low ? low + from : NULL, w, start + from, count, scalars);
  }
}

ENTRY(adamw_bf16) {
  real *restrict p = a->p;                      // (n)
  bf16 *restrict m = a->m, *restrict v = a->v;  // (n)
  int16_t *restrict low = a->low;               // (n) or NULL
  const float *restrict grad = a->grad;         // (n)
  int64_t n = a->n, start = a->start;           // start: the first element in the flat order of all parameters
  const StepScalars *scalars = a->scalars;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  Rule r = make_rule(scalars, a->beta1, a->beta2, a->eps, a->weight_decay, 1.0);
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += WEIGHTS) {
    int64_t count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    uint32_t bits[WEIGHTS];
    draw_bits(bits, start + from, count, MOMENT_STREAM, scalars);
    const float *restrict g = grad + from;
    bf16 *restrict mean = m + from, *restrict square = v + from;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      float first = bf16_to_float(mean[i]), second = bf16_to_float(square[i]);
      w[i] = update(w[i], &first, &second, g[i], r);
      mean[i] = round_stochastically(first, bits[i]);
      square[i] = round_stochastically(second, bits[i] >> 16);
    }
    store_weights(p + from, low ? low + from : NULL, w, start + from, count, scalars);
  }
}

// A moment is scale * q^power / top^power: 7 bits and a sign squared for m, 8 bits to the fourth power for v.
static inline float decode_first(uint8_t code, float scale) {
  float q = (float)(code & 127);
  return (code & 128 ? -scale : scale) * (q * q / 16129.0f);
}
static inline float decode_second(uint8_t code, float scale) {
  float q = (float)code;
  return scale * (q * q * q * q / 4228250625.0f);
}

// x >= 0 as a fraction of the scale, rounded stochastically between neighbouring codes: the mean of what is decoded is x.
static inline uint8_t encode_first(float x, float scale, uint32_t bits) {
  float a = scale > 0.0f ? fabsf(x) / scale : 0.0f, q = fminf(floorf(127.0f * sqrtf(a)), 127.0f);
  float chance = (a * 16129.0f - q * q) / ((q + 1.0f) * (q + 1.0f) - q * q);
  q = fminf(q + (float)((float)(bits & 0xffffu) * 0x1p-16f < chance), 127.0f);
  return (uint8_t)((int)q + (x < 0.0f ? 128 : 0));
}
static inline uint8_t encode_second(float x, float scale, uint32_t bits) {
  float a = scale > 0.0f ? x / scale : 0.0f, q = fminf(floorf(255.0f * sqrtf(sqrtf(a))), 255.0f), next = q + 1.0f;
  float power = q * q * q * q, chance = (a * 4228250625.0f - power) / (next * next * next * next - power);
  q = fminf(q + (float)((float)(bits >> 16) * 0x1p-16f < chance), 255.0f);
  return (uint8_t)(x > 0.0f ? fmaxf(q, 1.0f) : 0.0f);  // above 0 stays above 0: m is divided by its root
}

ENTRY(adamw_int8) {
  real *restrict p = a->p;                                             // (n)
  uint8_t *restrict m = a->m, *restrict v = a->v;                      // (n)
  float *restrict m_scale = a->m_scale, *restrict v_scale = a->v_scale;  // (n / SHARED)
  int16_t *restrict low = a->low;                                      // (n) or NULL
  const float *restrict grad = a->grad;                                // (n)
  int64_t n = a->n, start = a->start;  // start: the first element in the flat order of all parameters
  const StepScalars *scalars = a->scalars;
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  Rule r = make_rule(scalars, a->beta1, a->beta2, a->eps, a->weight_decay, 1.0);
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < n; from += SHARED) {
    float buffer[WEIGHTS], *restrict w = load_weights(buffer, p + from, low ? low + from : NULL, SHARED);
    float first[SHARED], second[SHARED], most1 = 0.0f, most2 = 0.0f;
    float *restrict scale1 = m_scale + from / SHARED, *restrict scale2 = v_scale + from / SHARED;
    uint8_t *restrict mean = m + from, *restrict square = v + from;
    const float *restrict g = grad + from;
    uint32_t bits[SHARED];
    draw_bits(bits, start + from, SHARED, MOMENT_STREAM, scalars);
#pragma omp simd reduction(max : most1, most2)
    for (int64_t i = 0; i < SHARED; i++) {
      first[i] = decode_first(mean[i], *scale1);
      second[i] = decode_second(square[i], *scale2);
      w[i] = update(w[i], first + i, second + i, g[i], r);
      most1 = fmaxf(most1, fabsf(first[i]));
      most2 = fmaxf(most2, second[i]);
    }
    *scale1 = most1;
    *scale2 = most2;
#pragma omp simd
    for (int64_t i = 0; i < SHARED; i++) {
      mean[i] = encode_first(first[i], most1, bits[i]);
      square[i] = encode_second(second[i], most2, bits[i]);
    }
    store_weights(p + from, low ? low + from : NULL, w, start + from, SHARED, scalars);
  }
}
