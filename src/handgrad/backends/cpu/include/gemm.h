// The GEMM of linear and lm_loss; gemm.c explains how it works.
//
//   C(m, n) = op(A)(m, k) * op(B)(k, n)      sums in float for every element type
//
// The result goes either to `sum` as float (parameter gradients, which may accumulate), or to `y` as real, after
// pre = C + addend + bias;  y = act(pre).
#pragma once
#include "kernel.h"

typedef struct {
  int64_t m, n, k;
  const real *a;     // (m, k), or (k, m) when a_trans; lda elements from row to row
  const real *b;     // (k, n), or (n, k) when b_trans; ldb elements from row to row
  int64_t lda, ldb, ldc;
  int a_trans, b_trans;
  float *sum;        // (m, n) float, or NULL: then y
  int accumulate;    // sum += C instead of sum = C
  real *y;           // (m, n)
  real *pre;         // (m, n) or NULL; only with an act
  const real *bias;  // (n) or NULL
  const real *addend;  // (m, n) like y, or NULL
  int act;           // of vmath.h
  int symmetric;     // y is symmetric, bit for bit (m = n, no epilogue): half of it is computed, and mirrored
  void *scratch;     // gemm_scratch bytes for at least this many threads, 64-byte aligned
  int64_t threads;   // at most this many threads run; scratch was sized for them
} Gemm;

// The result is bit-identical for any number of threads: they never split k.
#define gemm KERNEL(gemm)
void gemm(const Gemm *g);

// Bytes of scratch of one GEMM; to_sum: the result goes to `sum`.
#define gemm_scratch KERNEL(gemm_scratch)
int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int to_sum, int64_t threads);
