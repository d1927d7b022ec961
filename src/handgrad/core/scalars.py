"""The step scalars: values that change from step to step. They are in the arena, so that a bound program (or a captured
graph) never changes.

backends/cpu/include/scalars.h is the same struct in C; tests/test_backends.py compares the two layouts.
"""

# name, type, meaning
INPUTS = (  # written by the host
    ("seed", "u64", "seed of dropout and of stochastic rounding"),
    ("step", "i64", "optimizer step, counted from 1"),
    ("state_since", "i64", "steps before the optimizer's state began anew; 0: none"),
    ("micro_step", "i64", "index of the micro-batch in its step: a counter of dropout"),
    ("position", "i64", "decode: tokens already in the cache"),
    ("lr", "f32", "learning rate of this step"),
    ("loss_scale", "f32", "1 / (targets that count in the whole step)"),
    ("momentum", "f64", "momentum of this step, for optimizers that schedule it"),
)
OUTPUTS = (  # written by kernels
    ("loss_sum", "f64", "sum of the losses of the step's micro-batches, nats"),
    ("grad_norm", "f32", "global L2 norm of the gradients"),
    ("grad_scale", "f32", "clip factor that the optimizer applies; 0: no update, the gradients are not finite"),
    ("exposed_ns", "u64", "nanoseconds that computation has waited for other ranks, in all steps so far"),
)
STEP_SCALARS = INPUTS + OUTPUTS


def nbytes(fields: tuple[tuple[str, str, str], ...]) -> int:
    """Bytes of consecutive fields."""
    return sum(int(kind[1:]) // 8 for _, kind, _ in fields)


INPUT_BYTES, STEP_SCALARS_BYTES = nbytes(INPUTS), nbytes(STEP_SCALARS)
