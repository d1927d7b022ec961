// The step scalars: the host writes them into the arena before a step and kernels read them, so the bound arguments
// (and captured graphs) never change. Same layout as core/scalars.py; a test compares the two.
#pragma once
#include "kernel.h"

typedef struct {
  uint64_t seed;       // of dropout and of stochastic rounding
  int64_t step;        // optimizer step, counted from 1
  int64_t state_since;  // steps before the optimizer's state began anew; 0: none
  int64_t micro_step;  // index of the micro-batch in its step: a counter of dropout
  int64_t position;    // decode: tokens already in the cache
  float lr;            // learning rate of this step
  float loss_scale;    // 1 / (targets that count in the whole step)
  double momentum;     // momentum of this step, for optimizers that schedule it
  double loss_sum;     // out: sum of the losses of the step's micro-batches, nats
  float grad_norm;     // out: global L2 norm of the gradients
  float grad_scale;    // out: clip factor that the optimizer applies; 0: no update
  uint64_t exposed_ns;  // out: nanoseconds that computation has waited for other ranks, in all steps so far
} StepScalars;
