// muon: what surrounds the GEMMs that orthogonalise matrices                                       math: README.md §2
// writes =  p: (count) dtype;  in bf16 low: (count) i16;  v: (s) f32, a mean square of each row or column
// numerics  f32, matrices in the working dtype; totals in double;  bf16 without low: stochastic rounding
// layout    row_squares, scale, prepare | 5 x (GEMM, GEMM, polynomial, GEMM) | squares, even | apply
// determinism  fixed order of sums
// source    after Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express), Li et al. 2025 (NorMuon)
#include "polynomials.h"
#include "weights.cuh"

// -DTHREADS  of a block, but for column_squares, which has 32 x COLUMNS
// -DROW_VEC  4; 1 where N is not a multiple of 4
#if !defined(THREADS) || !defined(COLUMNS) || !defined(ROW_VEC)
#error "muon/op.py defines these"
#endif

__device__ __forceinline__ float coefficient(i64 polynomial, i64 step, int power) {
  const float all[2][STEPS][3] = POLYNOMIALS;
  return all[polynomial][step][power];
}

__device__ __forceinline__ double at_least(double norm) { return norm > (double)TINY ? norm : (double)TINY; }

// The same value in all threads, added in a fixed order.
__device__ __forceinline__ double block_sum(double x, double *buffer) {
  buffer[threadIdx.x] = x;
  __syncthreads();
  for (int half = THREADS / 2; half; half /= 2) {
    if ((int)threadIdx.x < half) buffer[threadIdx.x] += buffer[threadIdx.x + half];
    __syncthreads();
  }
  double sum = buffer[0];
  __syncthreads();
  return sum;
}

template <class T> __device__ __forceinline__ void row_squares(float *sums, const T *x, i64 N) {
  __shared__ float buffer[THREADS / 32];
  float sum = 0.0f;
  for (i64 j = threadIdx.x * ROW_VEC; j < N; j += THREADS * ROW_VEC) {
    Pack<T, ROW_VEC> part = load<T, ROW_VEC>(x + blockIdx.x * N + j);
#pragma unroll
    for (int k = 0; k < ROW_VEC; k++) sum += part.at(k) * part.at(k);
  }
  sum = block_reduce<THREADS>(sum, Sum(), 0.0f, buffer);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

KERNEL __launch_bounds__(THREADS)
muon_row_squares_kernel(float *__restrict__ sums, const float *__restrict__ u, i64 N) {  // (R), (R, N)
  row_squares(sums, u, N);
}

KERNEL __launch_bounds__(THREADS)
muon_x_row_squares_kernel(float *__restrict__ sums, const real *__restrict__ x, i64 N) {  // (R), (R, N)
  row_squares(sums, x, N);
}

// A block sums 32 columns of a matrix.
KERNEL __launch_bounds__(32 * COLUMNS)
muon_column_squares_kernel(float *__restrict__ sums, const real *__restrict__ x, i64 rows, i64 N) {  // (R / rows, N)
  __shared__ float buffer[COLUMNS][33];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const i64 column = (i64)blockIdx.x * 32 + lane;
  const real *from = x + blockIdx.y * rows * N;
  float sum = 0.0f;
  for (i64 i = group; i < rows && column < N; i += COLUMNS) {
    float value = to_float(from[i * N + column]);
    sum += value * value;
  }
  buffer[group][lane] = sum;
  __syncthreads();
  if (group || column >= N) return;
  for (int k = 1; k < COLUMNS; k++) sum += buffer[k][lane];
  sums[blockIdx.y * N + column] = sum;
}

// factors: of each row of u, so that the norm of a matrix is 1 but for a margin. A block takes a matrix.
KERNEL __launch_bounds__(THREADS)
muon_scale_kernel(float *__restrict__ factors, const float *__restrict__ sums,  // (R)
                  i64 rows, i64 polynomial, i64 row_scale) {
  __shared__ double buffer[THREADS];
  const float margins[] = MARGINS, eps[] = NORM_EPS;
  const i64 first = blockIdx.x * rows;
  double total = 0.0;
  for (i64 i = threadIdx.x; i < rows; i += THREADS) {
    float norm = sqrtf(sums[first + i]), factor = row_scale ? 1.0f / fmaxf(norm, TINY_ROW) : 1.0f;
    total += (double)(norm * factor) * (double)(norm * factor);
  }
  total = block_sum(total, buffer);
  const float scale = 1.0f / (margins[polynomial] * (float)sqrt(total) + eps[polynomial]);
  for (i64 i = threadIdx.x; i < rows; i += THREADS) {
    float factor = row_scale ? 1.0f / fmaxf(sqrtf(sums[first + i]), TINY_ROW) : 1.0f;
    factors[first + i] = factor * scale;
  }
}

KERNEL __launch_bounds__(THREADS)
muon_prepare_kernel(real *__restrict__ x, const float *__restrict__ u,       // (R, N)
                    const float *__restrict__ factors, i64 R, i64 N) {  // (R)
  for (i64 i = blockIdx.x; i < R; i += gridDim.x) {
    const float factor = factors[i];
    for (i64 j = threadIdx.x * ROW_VEC; j < N; j += THREADS * ROW_VEC) {
      Pack<float, ROW_VEC> from = load_streaming<float, ROW_VEC>(u + i * N + j);
      Pack<real, ROW_VEC> to;
#pragma unroll
      for (int k = 0; k < ROW_VEC; k++) to.set(k, from.v[k] * factor);
      store(x + i * N + j, to);
    }
  }
}

// poly = a + b gram + c poly, where poly was gram^2: (n / least^2, least, least)
KERNEL __launch_bounds__(THREADS)
muon_polynomial_kernel(real *__restrict__ poly, const real *__restrict__ gram, i64 n, i64 least, i64 polynomial,
                       i64 step) {
  const float a = coefficient(polynomial, step, 0), b = coefficient(polynomial, step, 1);
  const float c = coefficient(polynomial, step, 2);
  const u32 side = (u32)least, square = side * side;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += (i64)gridDim.x * THREADS) {
    const u32 at = (u32)(i % square);
    const float diagonal = at / side == at % side ? a : 0.0f;
    poly[i] = from_float<real>(diagonal + b * to_float(gram[i]) + c * to_float(poly[i]));
  }
}

// factors: of each row of x (each column where it is wide), from the sums of its squares; v is moved. A block takes a
// matrix.
KERNEL __launch_bounds__(THREADS)
muon_even_kernel(float *__restrict__ factors, float *__restrict__ v, const float *__restrict__ sums,
                 const StepScalars *scalars, i64 rows, i64 N, i64 rescale, float beta2) {
  __shared__ double buffer[THREADS];
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite: v stays, and apply reads no factor
  const i64 lines = rows < N ? N : rows, least = rows < N ? rows : N, first = blockIdx.x * lines;
  double total = 0.0, after = 0.0;
  for (i64 i = threadIdx.x; i < lines; i += THREADS) total += (double)sums[first + i];
  const double norm = sqrt(block_sum(total, buffer));
  const double factor = rescale ? sqrt((double)least) / at_least(norm) : 1.0;
  double same = factor;
  if (v) {
    for (i64 i = threadIdx.x; i < lines; i += THREADS) {
      const double sum = factor * factor * (double)sums[first + i];
      float mean = v[first + i];
      mean += (1.0f - beta2) * ((float)(sum / (double)least) - mean);
      v[first + i] = mean;
      factors[first + i] = 1.0f / sqrtf(fmaxf(mean, TINY));
      after += sum * (double)factors[first + i] * (double)factors[first + i];
    }
    same *= factor * norm / at_least(sqrt(block_sum(after, buffer)));
  }
  for (i64 i = threadIdx.x; i < lines; i += THREADS)
    factors[first + i] = (float)same * (v ? factors[first + i] : 1.0f);
}

// p moves against elements first .. first + count - 1 of x; factors: NULL, or of rows, or of columns where x is wide
KERNEL __launch_bounds__(THREADS)
muon_apply_kernel(real *__restrict__ p, short *__restrict__ low,                                         // (count)
                  const real *__restrict__ x, const float *__restrict__ factors, const StepScalars *scalars,
                  i64 N, i64 rows, i64 first, i64 count, i64 start, i64 cautious, float scale, float weight_decay) {
  if (scalars->grad_scale == 0.0f) return;  // the gradients are not finite
  const float rate = scalars->lr * scale, shrink = scalars->lr * weight_decay;
  const Draws draws(scalars, WEIGHT_STREAM);
  const u32 wide = rows < N, size = (u32)(rows * N), columns = (u32)N;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < count; i += (i64)gridDim.x * THREADS * 4) {
    Pack<real, 4> step = read(x + first, i, count);
    Weights weight(p, low, i, count, start, draws);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float o = step.at(k);
      if (factors && i + k < count) {
        const u32 matrix = (u32)((first + i + k) / size), at = (u32)((first + i + k) % size);
        o *= factors[wide ? matrix * columns + at % columns : (u32)(matrix * rows) + at / columns];
      }
      const float w = weight.at(k), decay = cautious && o * w < 0.0f ? 0.0f : shrink;
      weight.set(k, w - decay * w - rate * o);
    }
    weight.write_to(p, low, i, count);
  }
}
