// Which tiles of the exp GEMM a cluster computes, and in which order. Plain C++: a test runs it for every cluster.
//
// Defines (ops/wgmma_gemm.py): TILE_M, TILE_N, TILE_K, CLUSTER.
#pragma once

enum {
  CLUSTER_M = CLUSTER * TILE_M,
  GROUP = 16  // least tiles of M that go through N together, so that b is read from L2
};

// Steps [k0, k1) of K of a tile: here always all of them.
struct TileSteps { int tile, k0, k1; };

// Clusters take tiles in turn. Tiles come in groups of M: all of a group for one n, then for the next n.
struct ExpTiles {
  int tiles_m, tiles_n, steps, clusters, tiles;
  __device__ ExpTiles(i64 M, i64 N, i64 K, int clusters_) : clusters(clusters_) {
    tiles_m = (int)((M + CLUSTER_M - 1) / CLUSTER_M);
    tiles_n = (int)((N + TILE_N - 1) / TILE_N);
    steps = (int)((K + TILE_K - 1) / TILE_K);
    tiles = tiles_m * tiles_n;
  }
  __device__ void coordinates(int tile, int &m, int &n) const {
    int most = (clusters + tiles_n - 1) / tiles_n > GROUP ? (clusters + tiles_n - 1) / tiles_n : GROUP;
    int first = tile / (most * tiles_n) * most, within = tile % (most * tiles_n);
    int size = tiles_m - first < most ? tiles_m - first : most;
    m = first + within % size;
    n = within / size;
  }
  // The i-th tile of a cluster; false if it has fewer.
  __device__ bool get(int i, int cluster, TileSteps &at) const {
    at = {i * clusters + cluster, 0, steps};
    return at.tile < tiles;
  }
};
