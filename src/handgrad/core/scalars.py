"""The per-step scalars. They live in the arena, so a bound program (or a captured graph) never changes.

The C mirror is backends/cpu/include/scalars.h; tests/test_backends.py compares the two layouts.
"""

STEP_SCALARS = (
    # name, type, meaning
    ("seed", "u64", "seed of dropout"),
    ("step", "i64", "optimizer step, counted from 1"),
    ("micro_step", "i64", "index inside the accumulation; 0 writes parameter gradients, later ones add to them"),
    ("position", "i64", "decode: tokens already in the cache"),
    ("lr", "f32", "learning rate of this step"),
    ("loss_scale", "f32", "1 / (targets that count in the whole step)"),
    ("grad_norm", "f32", "out: global L2 norm of the gradients"),
    ("grad_scale", "f32", "out: clip factor that the optimizer applies"),
)
STEP_SCALARS_BYTES = sum(8 if kind[1:] == "64" else 4 for _, kind, _ in STEP_SCALARS)
