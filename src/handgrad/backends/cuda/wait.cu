// The time that the main stream waits for the communication stream, added up on the device: one kernel before the wait,
// one after it.
#include "ptx.cuh"

KERNEL wait_begin_kernel(StepScalars *scalars) { scalars->exposed_ns -= nanoseconds(); }

KERNEL wait_end_kernel(StepScalars *scalars) { scalars->exposed_ns += nanoseconds(); }
