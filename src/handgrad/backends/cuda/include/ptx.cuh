// Inline PTX for sm_80 and newer, one function per instruction, so that kernels are plain C++.
//
// Fragments, with g = lane / 4, t = lane % 4; a register holds two bf16, the first in its low half:
//   load_matrix             lanes 8 i .. 8 i + 7 give the rows of tile i; r[i] = its elements (g, 2 t), (g, 2 t + 1)
//   load_matrix_transposed  the same with r[i] = elements (2 t, g), (2 t + 1, g)
//   mma_bf16                a[0..3] = (g, 2 t) (g + 8, 2 t) (g, 2 t + 8) (g + 8, 2 t + 8) of a, and the next column
//                           of each; b0, b1 = (2 t, g) (2 t + 8, g) of b, and the next row of each;
//                           d = (g, 2 t) (g, 2 t + 1) (g + 8, 2 t) (g + 8, 2 t + 1)
// The host version (HG_HOST, tests/emulator) defines every function of this file. All 32 lanes of a warp call a
// collective; asynchronous copies may complete at once.
#pragma once
#include "kernel.cuh"
#ifndef HG_HOST

// Four 8x8 tiles of 16-bit elements; every lane gives the address of one row of 16 bytes in shared memory.
__device__ __forceinline__ void load_matrix(u32 r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(row)));
}
__device__ __forceinline__ void load_matrix_transposed(u32 r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(row)));
}
// d (16 x 8, f32) += a (16 x 16, bf16, row) b (16 x 8, bf16, column)
__device__ __forceinline__ void mma_bf16(float d[4], const u32 a[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Starts an asynchronous copy of 16 bytes from global to shared memory; zeros if not `valid`.
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// The same for data that no kernel reads again soon: L2 evicts it first. NVRTC 13.0 makes an illegal instruction of the
// hint where copies follow each other closely (norm_backward of 256 columns).
__device__ __forceinline__ void copy_async_streaming(void *shared, const void *global) {
#if __CUDACC_VER_MAJOR__ == 13 && __CUDACC_VER_MINOR__ < 3
  copy_async(shared, global);
#else
  asm volatile("{.reg .b64 first;\ncreatepolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
               "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, first;}"
               :: "r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
#endif
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}
// A clock that all SMs share, in nanoseconds.
__device__ __forceinline__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
// 2^x to 2 ULP; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two bf16 in a register, `low` in the low half, rounded to nearest even.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif
