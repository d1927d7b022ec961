// Who computes what of our own product on Hopper (hopper.cu): the tiles of a cluster in order, and tiles cut along k. Plain
// C++, which a test runs for every cluster.
#pragma once

enum {
  TILE_M = 128, TILE_N = 256, TILE_K = 64, CLUSTER = 2, BOX = 64 * 64 * 2,  // bytes of a box: 64 rows of 64 values
  GROUP = 16,                         // at least so many pairs of tiles of M go together through N, so that b is read from L2
  PIECE = 4 * 64 * TILE_N,            // floats of a piece: both blocks, both warp groups
  LEAST = 8                           // steps that a first part has, so that there are not too many to add up
};

// A cluster computes pairs of tiles (2 TILE_M x TILE_N), k in steps of TILE_K. Without EXPONENTIALS, tiles that do not fill
// a round of all clusters are cut along k, so that all clusters end together: `heads` clusters take equal first parts of a
// tile, side by side in k since they read the same rows then; the rest share the tails.
struct Work {
  int tiles_m, tiles_n, steps, clusters, whole, rest, heads, part, tail, helpers, share;
  __device__ Work(i64 M, i64 N, i64 K, int clusters_) {
    clusters = clusters_;
    tiles_m = (int)((M + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M));
    tiles_n = (int)((N + TILE_N - 1) / TILE_N);
    steps = (int)((K + TILE_K - 1) / TILE_K);
    whole = tiles_m * tiles_n;
    rest = heads = part = tail = helpers = share = 0;
#if !EXPONENTIALS
    rest = whole % clusters;
    if (rest * 20 > clusters * 17) rest = 0;  // nearly a round
    whole -= rest;
    if (rest) {
      heads = clusters / rest;
      part = (rest * steps + clusters - 1) / clusters;
      if (part < LEAST) part = LEAST;
      if (heads * part > steps) heads = (steps + part - 1) / part;
      tail = steps > heads * part ? steps - heads * part : 0;
      helpers = clusters - heads * rest;
      share = helpers ? (rest * tail + helpers - 1) / helpers : 0;
    }
#endif
  }
  __device__ void place(int tile, int &m, int &n) const {
#if !EXPONENTIALS
    m = tile / tiles_n;
    n = tile % tiles_n;
#else
    int most = (clusters + tiles_n - 1) / tiles_n > GROUP ? (clusters + tiles_n - 1) / tiles_n : GROUP;
    int first = tile / (most * tiles_n) * most, within = tile % (most * tiles_n);
    int size = tiles_m - first < most ? tiles_m - first : most;
    m = first + within % size;
    n = within / size;
#endif
  }
  // Row sums of a, behind the pieces: those of whole tiles, then those of pieces.
  __device__ float *rows(float *parts, int i) const { return parts + (i64)(clusters + rest) * PIECE + (i64)i * (CLUSTER * TILE_M); }
  __device__ const float *rows(const float *parts, int i) const { return rows((float *)parts, i); }
  // Calls add(slot) for the pieces of tile `whole + t`, in order.
  template <class Add> __device__ void pieces(int t, Add add) const {
#pragma unroll 4
    for (int f = 0; f < heads; f++) add(f * rest + t);
    if (!tail) return;
    for (int j = t * tail / share; j <= ((t + 1) * tail - 1) / share; j++) add(heads * rest + j + t);
  }
  // Piece number `i` of a cluster: the tile, its steps of k, and where a piece of a tile is kept (-1: a whole tile).
  __device__ bool get(int i, int cluster, int &tile, int &k0, int &k1, int &slot) const {
    tile = i * clusters + cluster;
    k0 = 0;
    k1 = steps;
    slot = -1;
    if (tile < whole) return true;
    if (!rest) return false;
    i -= (whole + clusters - 1 - cluster) / clusters;  // pieces come after the whole tiles
    if (cluster < heads * rest) {
      int f = cluster / rest;
      tile = whole + cluster % rest;
      k0 = f * part;
      k1 = k0 + part < steps ? k0 + part : steps;
      slot = cluster;
      return i == 0 && k0 < k1;
    }
    int j = cluster - heads * rest, begin = j * share, end = begin + share < rest * tail ? begin + share : rest * tail;
    if (begin >= end) return false;
    int t = begin / tail + i, from = t * tail > begin ? t * tail : begin, to = (t + 1) * tail < end ? (t + 1) * tail : end;
    if (from >= to) return false;
    tile = whole + t;
    k0 = heads * part + from - t * tail;
    k1 = heads * part + to - t * tail;
    slot = heads * rest + j + t;
    return true;
  }
};
