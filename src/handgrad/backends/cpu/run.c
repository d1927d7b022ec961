// run: executes consecutive bound calls of the list. One call from Python runs a whole segment.
#define HG_ARGUMENT_LINES
#define HG_DTYPE f32
#define HG_ISA portable
#include "kernel.h"
#include <time.h>

// Replaces a call that does not run in this micro-batch.
EXPORT void hg_skip(const void *args) { (void)args; }

EXPORT void hg_run(const Entry *list, int64_t n) {
  for (int64_t i = 0; i < n; i++) list[i].fn(list[i].args);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// hg_run that adds the seconds of call i to seconds[i].
EXPORT void hg_run_timed(const Entry *list, int64_t n, double *seconds) {
  for (int64_t i = 0; i < n; i++) {
    double begin = now();
    list[i].fn(list[i].args);
    seconds[i] += now() - begin;
  }
}

// The widest instruction set of this processor and operating system: 3 avx512bf16, 2 avx512, 1 avx2, 0 portable.
EXPORT int hg_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16")) return 3;
    return wide ? 2 : 1;
  }
#endif
  return 0;
}

EXPORT void hg_set_threads(int n) {
#ifdef _OPENMP
  omp_set_num_threads(n);
#else
  (void)n;
#endif
}
