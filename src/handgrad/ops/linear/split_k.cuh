// Which tiles of the weight gradient a cluster computes, and which steps of K of them. Plain C++: a test runs it for
// every cluster of a GPU.
//
// Defines (ops/wgmma_gemm.py): TILE_M, TILE_N, TILE_K, CLUSTER, WARPGROUPS.
#pragma once

enum {
  CLUSTER_M = CLUSTER * TILE_M,
  PARTIAL = CLUSTER * WARPGROUPS * 64 * TILE_N,  // floats of a split-K partial: all blocks and warpgroups of a cluster
  LEAST_STEPS = 8                                // of a head: shorter ones would make too many partials to add up
};

// Steps [k0, k1) of K of a tile. partial: where their sum is stored; -1: the whole tile, which goes to out.
struct TileSteps { int tile, k0, k1, partial; };

// The last `split` tiles would not fill a round of all clusters. They are split along K, so that all clusters finish
// together: each split tile has `heads` clusters that compute equal first shares of K, side by side because they read
// the same rows at the same time. The other clusters, the helpers, share the tails that are left.
struct SplitK {
  int tiles_m, tiles_n, steps, clusters;
  int whole, split;              // tiles of one cluster each; tiles that are split
  int heads, head_steps, tail;   // of a split tile: heads, steps of a head, steps left for helpers
  int helpers, helper_steps;
  __device__ SplitK(i64 M, i64 N, i64 K, int clusters_, int split_) : clusters(clusters_), split(split_) {
    tiles_m = (int)((M + CLUSTER_M - 1) / CLUSTER_M);
    tiles_n = (int)((N + TILE_N - 1) / TILE_N);
    steps = (int)((K + TILE_K - 1) / TILE_K);
    whole = tiles_m * tiles_n - split;
    heads = head_steps = tail = helpers = helper_steps = 0;
    if (!split) return;
    heads = clusters / split;
    head_steps = (split * steps + clusters - 1) / clusters;
    if (head_steps < LEAST_STEPS) head_steps = LEAST_STEPS;
    if (heads * head_steps > steps) heads = (steps + head_steps - 1) / head_steps;
    tail = steps > heads * head_steps ? steps - heads * head_steps : 0;
    helpers = clusters - heads * split;
    helper_steps = helpers ? (split * tail + helpers - 1) / helpers : 0;
  }
  __device__ void coordinates(int tile, int &m, int &n) const {
    m = tile / tiles_n;
    n = tile % tiles_n;
  }
  // Row sums of a, after the partials: those of whole tiles, then those of partials.
  __device__ float *row_sums(float *partials, int i) const {
    return partials + (i64)(clusters + split) * PARTIAL + (i64)i * CLUSTER_M;
  }
  __device__ const float *row_sums(const float *partials, int i) const { return row_sums((float *)partials, i); }

  // Calls add(partial) for the partials of tile `whole + t`, in order.
  template <class Add> __device__ void for_each_partial(int t, Add add) const {
#pragma unroll 4
    for (int head = 0; head < heads; head++) add(head * split + t);
    if (!tail) return;
    int first = t * tail / helper_steps, last = ((t + 1) * tail - 1) / helper_steps;
    for (int helper = first; helper <= last; helper++) add(heads * split + helper + t);
  }

  // The i-th work item of a cluster; false if it has fewer. Whole tiles come first.
  __device__ bool get(int i, int cluster, TileSteps &at) const {
    at = {i * clusters + cluster, 0, steps, -1};
    if (at.tile < whole) return true;
    if (!split) return false;
    i -= (whole + clusters - 1 - cluster) / clusters;
    if (cluster < heads * split) return get_head(i, cluster, at);
    return get_tail(i, cluster - heads * split, at);
  }
  __device__ bool get_head(int i, int cluster, TileSteps &at) const {
    int head = cluster / split;
    at.tile = whole + cluster % split;
    at.k0 = head * head_steps;
    at.k1 = at.k0 + head_steps < steps ? at.k0 + head_steps : steps;
    at.partial = cluster;
    return i == 0 && at.k0 < at.k1;
  }
  __device__ bool get_tail(int i, int helper, TileSteps &at) const {
    int begin = helper * helper_steps;  // of the steps of all tails, one tile's after the other's
    int end = begin + helper_steps < split * tail ? begin + helper_steps : split * tail;
    if (begin >= end) return false;
    int t = begin / tail + i;
    int from = t * tail > begin ? t * tail : begin, to = (t + 1) * tail < end ? (t + 1) * tail : end;
    if (from >= to) return false;
    int k = heads * head_steps - t * tail;
    at = {whole + t, k + from, k + to, heads * split + helper + t};
    return true;
  }
};
