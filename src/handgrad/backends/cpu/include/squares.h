// The sum of squares in double: squares of finite float32 do not overflow, and order hardly matters. Chunks are fixed and
// added in order, so the bits do not depend on the number of threads; NaN and inf reach the sum.
#pragma once
#include "kernel.h"

#define CHUNK 32768  // elements

// Bytes of scratch that the partial sums of n elements take.
static inline int64_t squares_scratch(int64_t n) { return (n + CHUNK - 1) / CHUNK * (int64_t)sizeof(double); }

// Returns the sum of the squares of x (n); partial: one double a chunk.
static inline double sum_of_squares(const float *x, int64_t n, double *partial) {
  int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < chunks; k++) {
    int64_t end = (k + 1) * CHUNK < n ? (k + 1) * CHUNK : n;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k * CHUNK; i < end; i++) sum += (double)x[i] * (double)x[i];
    partial[k] = sum;
  }
  double total = 0.0;
  for (int64_t k = 0; k < chunks; k++) total += partial[k];
  return total;
}
