// The processor's FMA peak in GFLOP/s over all OpenMP threads, best of 7. Prints two numbers, "fp32 bf16".
//
// The loops keep 24 (AVX2: 13) independent sums in registers, in assembly so that no compiler spills or narrows them.
// bf16 uses vdpbf16ps; without it, bf16 converts to fp32 and has the peak of fp32.
// build: cc -O2 -fopenmp peak.c -o peak        (x86-64; prints "0 0" without AVX2 and FMA)
#include <omp.h>
#include <stdio.h>

#define SUMS "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23"
#define FIRST_13 "0,1,2,3,4,5,6,7,8,9,10,11,12"
#define EACH(registers, op) __asm__ volatile(".irp r," registers "\n" op "\n.endr" ::: "memory")
#define LOOP __attribute__((noinline)) static void  // not inlined: the loop clobbers registers

LOOP fma512(long n) {
  EACH(SUMS ",30,31", "vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r");
  for (long i = 0; i < n; i++) EACH(SUMS, "vfmadd231ps %%zmm31, %%zmm30, %%zmm\\r");
}
LOOP fma256(long n) {
  EACH(FIRST_13 ",14,15", "vpxor %%ymm\\r, %%ymm\\r, %%ymm\\r");
  for (long i = 0; i < n; i++) EACH(FIRST_13, "vfmadd231ps %%ymm15, %%ymm14, %%ymm\\r");
}
LOOP dot_bf16(long n) {
  EACH(SUMS ",30,31", "vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r");
  for (long i = 0; i < n; i++) EACH(SUMS, "vdpbf16ps %%zmm31, %%zmm30, %%zmm\\r");
}

// GFLOP/s of a loop that does `flop` operations an iteration.
static double rate(void (*loop)(long), double flop) {
  const long turns = 1000000;
  double best = 0;
  for (int r = 0; r < 7; r++) {
    double begin = omp_get_wtime();
#pragma omp parallel
    loop(turns);
    double now = flop * (double)turns * omp_get_max_threads() / (omp_get_wtime() - begin) / 1e9;
    best = now > best ? now : best;
  }
  return best;
}

int main(void) {
  double fp32 = 0, bf16 = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) fp32 = rate(fma512, 24 * 16 * 2);
  else if (__builtin_cpu_supports("fma")) fp32 = rate(fma256, 13 * 8 * 2);
  bf16 = __builtin_cpu_supports("avx512bf16") ? rate(dot_bf16, 24 * 32 * 2) : fp32;
#endif
  printf("%.1f %.1f\n", fp32, bf16);
  return 0;
}
