// buckets: distances that share a bias of attention                             math: ops/attention/README.md §2
// source    own work; buckets after Raffel et al. 2020 (T5)
#pragma once
#include "kernel.cuh"

#define FAR 128  // distances from here on share a bucket

// The bucket of a distance n among `count`: exact below count / 2, then by its logarithm. Powers instead of logarithms:
// products of small whole numbers are exact, so that all engines agree on the borders.
__device__ __forceinline__ int distance_bucket(int n, int count) {
  int exact = count / 2, bucket = exact;
  double power = 1.0, bound = (double)FAR / exact;
  if (n < exact) return n;
  for (int i = exact; i < count; i++) power *= (double)n / exact;
  for (; bucket + 1 < count && power >= bound; bucket++) bound *= (double)FAR / exact;
  return bucket;
}