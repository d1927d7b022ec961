// gated: y = act(gate) * up, where x = gate | up                                           math: README.md §2, §3
// forward   writes =  y: (N, M) dtype
// backward  writes =  dx: (N, 2 M) dtype
// numerics  in float, each output rounded once; in bf16 the hardware's e^x and division (activation.cuh)
// layout    a thread makes PACKS 16-byte accesses to each array, all loads before the first store
// speed     not measured yet
// source    own work
#include "activation.cuh"

// -DCOLUMNS  M, the columns of y
// -DVEC      elements of one access: 16 bytes of them where M is a multiple, else 1
// -DPACKS    accesses of a thread to each array
// -DTHREADS  of a block
// -DACT      the activation, a number of activation.cuh
#if !defined(COLUMNS) || !defined(VEC) || !defined(PACKS) || !defined(THREADS)
#error "gated/op.py defines these"
#endif

// Pack k of this thread: whether it is one of y's, and where it is in y and in the gate.
struct Place {
  i64 y, gate;
  bool valid;
  __device__ __forceinline__ Place(i64 N, int k) {
    enum { ROW = COLUMNS / VEC };
    i64 pack = ((i64)blockIdx.x * PACKS + k) * THREADS + threadIdx.x, row = pack / ROW;
    y = pack * VEC;
    gate = y + row * COLUMNS;  // rows of x are twice as long
    valid = row < N;
  }
};

KERNEL __launch_bounds__(THREADS) gated_kernel(
    real *__restrict__ y,        // (N, M)
    const real *__restrict__ x,  // (N, 2 M)
    i64 N) {
  Pack<real, VEC> gate[PACKS], up[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    const Place at(N, k);
    if (!at.valid) break;
    gate[k] = load_streaming<real, VEC>(x + at.gate);
    up[k] = load_streaming<real, VEC>(x + at.gate + COLUMNS);
  }
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    const Place at(N, k);
    if (!at.valid) break;
#pragma unroll
    for (int q = 0; q < VEC; q++) gate[k].set(q, act_of(gate[k].at(q)) * up[k].at(q));
    store(y + at.y, gate[k]);
  }
}

// A 16-byte store that the compiler does not split, as it does one of two plain ones. What it writes stays in L2 for the
// next GEMMs.
__device__ __forceinline__ void store_whole(real *p, const Pack<real, VEC> &x) {
  if constexpr (sizeof(x) == 16) __stcg((int4 *)p, *(const int4 *)&x);
  else *(Pack<real, VEC> *)p = x;
}

KERNEL __launch_bounds__(THREADS) gated_backward_kernel(
    real *__restrict__ dx,        // (N, 2 M)
    const real *__restrict__ dy,  // (N, M)
    const real *__restrict__ x,   // (N, 2 M)
    i64 N) {
  Pack<real, VEC> d[PACKS], gate[PACKS], up[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    const Place at(N, k);
    if (!at.valid) break;
    d[k] = load_streaming<real, VEC>(dy + at.y);
    gate[k] = load_streaming<real, VEC>(x + at.gate);
    up[k] = load_streaming<real, VEC>(x + at.gate + COLUMNS);
  }
#pragma unroll
  for (int k = 0; k < PACKS; k++) {
    const Place at(N, k);
    if (!at.valid) break;
    Pack<real, VEC> dgate, dup;
#pragma unroll
    for (int q = 0; q < VEC; q++) {
      float value, slope, dy_up = d[k].at(q) * up[k].at(q);
      act_both(gate[k].at(q), value, slope);
      dgate.set(q, dy_up * slope);
      dup.set(q, d[k].at(q) * value);
    }
    store_whole(dx + at.gate, dgate);
    store_whole(dx + at.gate + COLUMNS, dup);
  }
}
