// rms: the root mean square of a parameter's weights, of all or of ranks' pieces                   math: README.md §2
// writes =  y: (1) f32, (k)
// numerics  squares and sums in double
// layout    threads divide blocks of elements; one partial sum a block
// determinism  blocks are fixed and added in order, for any number of threads
// source    own work
#include "weights.h"

SCRATCH(rms)(int64_t n) { return (n + WEIGHTS - 1) / WEIGHTS * (int64_t)sizeof(double); }

ENTRY(rms) {
  float *y = a->y;               // (1)
  real *p = a->p;                // (n)
  const int16_t *low = a->low;   // (n) or NULL
  double *partial = a->scratch;  // one a block
  int64_t n = a->n, blocks = (n + WEIGHTS - 1) / WEIGHTS;
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < blocks; k++) {
    int64_t from = k * WEIGHTS, count = from + WEIGHTS < n ? WEIGHTS : n - from;
    float buffer[WEIGHTS], *w = load_weights(buffer, p + from, low ? low + from : NULL, count);
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += (double)w[i] * (double)w[i];
    partial[k] = sum;
  }
  double sum = 0.0;
  for (int64_t k = 0; k < blocks; k++) sum += partial[k];
  y[0] = (float)fmax(sqrt(sum / (double)a->count), a->least);
}

ENTRY(rms_of_ranks) {
  float *y = a->y;        // (k)
  const float *x = a->x;  // (W, k)
  for (int64_t j = 0; j < a->k; j++) {
    double sum = 0.0;
    for (int64_t r = 0; r < a->W; r++) sum += (double)x[r * a->k + j] * (double)x[r * a->k + j];
    y[j] = (float)fmax(sqrt(sum), a->least);
  }
}
