// adafactor: the means of squared gradients over rows and columns, and p                           math: README.md §2
// writes =  p: (k) dtype;  row: (M) f32;  col: (K) f32;  in bf16 low: (k) i16, the half of the weight that p lacks
// numerics  f32, the step's size in double;  bf16 without low: stochastic rounding, ops/adamw/README.md §5
// layout    a block per row; a block per 32 columns; a mean of the rows; two passes by a grid that fills the GPU
// determinism  every sum in a fixed order, which depends on the number of SMs
// source    after Shazeer & Stern 2018, algorithm 6
// -DROWS -DCOLUMNS  M and K;  -DDECAY: of the means
// -DBLOCKS       of the grids over all elements, of THREADS threads;  -DSUM_THREADS: of the block that adds up the rows
#if !defined(ROWS) || !defined(COLUMNS) || !defined(DECAY) || !defined(BLOCKS) || !defined(THREADS) || !defined(SUM_THREADS)
#error "adafactor/op.py defines these"
#endif
#include "weights.cuh"
#include "squares.cuh"

// Updates of the state so far, this one included.
__device__ __forceinline__ double age(const StepScalars *scalars) {
  return (double)(scalars->step - scalars->state_since);
}

// old, moved towards the mean of squares
__device__ __forceinline__ float moved(float old, float mean, float eps, const StepScalars *scalars) {
  const float take = (float)pow(age(scalars), -DECAY);  // 1 - beta
  return (1.0f - take) * old + take * (mean + eps);
}

KERNEL __launch_bounds__(THREADS)
adafactor_rows_kernel(float *__restrict__ row, const grad_t *__restrict__ grad, const StepScalars *scalars, float eps) {
  __shared__ float buffer[THREADS / 32];
  const float scale = scalars->grad_scale;
  if (scale == 0.0f) return;  // the gradients are not finite
  const grad_t *g = grad + (i64)blockIdx.x * COLUMNS;
  float sum = 0.0f;
  for (int j = threadIdx.x; j < COLUMNS; j += THREADS) {
    float d = to_float(g[j]) * scale;
    sum += d * d;
  }
  sum = block_reduce<THREADS>(sum, Sum(), 0.0f, buffer);
  if (threadIdx.x == 0) row[blockIdx.x] = moved(row[blockIdx.x], sum / (float)COLUMNS, eps, scalars);
}

KERNEL __launch_bounds__(1024)
adafactor_columns_kernel(float *__restrict__ col, const grad_t *__restrict__ grad, const StepScalars *scalars, float eps) {
  __shared__ float sums[32][33];
  const float scale = scalars->grad_scale;
  if (scale == 0.0f) return;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, j = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (j < COLUMNS)
    for (i64 i = part; i < ROWS; i += 32) {
      float d = to_float(grad[i * COLUMNS + j]) * scale;
      sum += d * d;
    }
  sums[part][lane] = sum;
  __syncthreads();
  if (part == 0 && j < COLUMNS) {
    for (int k = 1; k < 32; k++) sum += sums[k][lane];
    col[j] = moved(col[j], sum / (float)ROWS, eps, scalars);
  }
}

KERNEL __launch_bounds__(SUM_THREADS)
adafactor_mean_kernel(double *__restrict__ mean, const float *__restrict__ row) {  // (1), (M)
  double sum = 0.0;
  for (int i = threadIdx.x; i < ROWS; i += SUM_THREADS) sum += (double)row[i];
  sum = block_sum<SUM_THREADS>(sum);
  if (threadIdx.x == 0) mean[0] = sum / (double)ROWS;
}

// The step of element i before it is scaled by its size and the learning rate.
__device__ __forceinline__ float direction(float g, i64 i, float mean, const float *row, const float *col) {
  return g * sqrtf(mean / row[i / COLUMNS]) / sqrtf(col[i % COLUMNS]);
}

KERNEL __launch_bounds__(THREADS)
adafactor_sum_kernel(double *__restrict__ scratch,                                        // the mean, (BLOCKS)
                     const float *__restrict__ row, const float *__restrict__ col,        // (M), (K)
                     const grad_t *__restrict__ grad, const StepScalars *scalars, i64 n) {  // (n)
  const float scale = scalars->grad_scale, mean = (float)scratch[0];
  double sum = 0.0;
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)BLOCKS * THREADS * 4) {
    const Pack<grad_t, 4> g = read(grad, i, n);
    for (int k = 0; k < 4 && i + k < n; k++) {
      const double u = (double)direction(g.at(k) * scale, i + k, mean, row, col);
      sum += u * u;
    }
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) scratch[1 + blockIdx.x] = sum;
}

KERNEL __launch_bounds__(THREADS)
adafactor_kernel(real *__restrict__ p, short *__restrict__ low,                  // (n), from `first` on; low or NULL
                 const double *__restrict__ scratch,                             // the mean, (BLOCKS)
                 const float *__restrict__ row, const float *__restrict__ col,   // (M), (K)
                 const grad_t *__restrict__ grad, const float *factor, const StepScalars *scalars,  // factor: (1) or NULL
                 i64 n, i64 first, i64 start, i64 count, float clip, float weight_decay, i64 relative_step) {
  __shared__ float shared_rate;
  const float scale = scalars->grad_scale, mean = (float)scratch[0];
  if (scale == 0.0f) return;
  double sum = 0.0;
  for (int k = threadIdx.x; k < BLOCKS; k += THREADS) sum += scratch[1 + k];
  sum = block_sum<THREADS>(sum);
  const double lr = scalars->lr;
  if (threadIdx.x == 0) {
    const double size = sqrt(sum / (double)count) / (double)clip, most = 1.0 / sqrt(age(scalars));
    const double step_lr = relative_step && most < lr ? most : lr;
    shared_rate = (float)(step_lr * (factor ? factor[0] : 1.0f) / (size > 1.0 ? size : 1.0));
  }
  __syncthreads();
  const float rate = shared_rate, shrink = (float)(1.0 - lr * (double)weight_decay);
  const Draws draws(scalars, WEIGHT_STREAM);
  for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (i64)BLOCKS * THREADS * 4) {
    const Pack<grad_t, 4> g = read(grad + first, i, n);
    Weights weight(p, low, i, n, start, draws);
    for (int k = 0; k < 4 && i + k < n; k++)
      weight.set(k, shrink * weight.at(k) - rate * direction(g.at(k) * scale, first + i + k, mean, row, col));
    weight.write_to(p, low, i, n);
  }
}
