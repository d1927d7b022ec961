// normal: normal numbers from random words, by the formulas of torch's scalar CPU code, which llm.c follows.
// Compiled once, without vector instructions: the last bits depend on the C library's float functions.
#include <math.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

// out (16 n) = std times normal numbers, from words (16 n); both in blocks of 16: eight cosines, then their eight
// sines. The low 24 bits of a word, over 2^24, are a uniform number. llm.c adds 1e-12 inside the logarithm, torch does
// not.
EXPORT void hg_normal(float *out, const uint32_t *words, int64_t n, float std) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < 16 * n; i += 16)
    for (int j = 0; j < 8; j++) {
      float a = 1 - (float)(words[i + j] & 0xFFFFFF) * 0x1p-24f;
      float b = (float)(words[i + j + 8] & 0xFFFFFF) * 0x1p-24f;
      float radius = sqrtf(-2 * logf((float)(a + 1e-12)));
      float angle = (float)(2 * M_PI * b);
      out[i + j] = radius * cosf(angle) * std;
      out[i + j + 8] = radius * sinf(angle) * std;
    }
}
