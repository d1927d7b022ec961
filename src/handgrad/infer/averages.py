"""What reads an average of the weights from a checkpoint: that of --ema, or that of ScheduleFree."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.io import checkpoint
from handgrad.ops.adamw.reference import join_weight
from handgrad.ops.schedule_free.reference import average

Read = Callable[[str], np.ndarray]  # a parameter by its name


def ema(folder: Path, program: Program, read: Read) -> Read:
    """Returns what reads a parameter's moving average, float32. A frozen parameter has none: `read` reads it.

    Raises HandgradError if the checkpoint holds no average.
    """
    held, params = checkpoint.state_names(folder), program.params.items()
    names = {name: info.tensor.shape for name, info in params if f"{checkpoint.EMA}.{name}" in held}
    if not names:
        raise HandgradError("model", "--ema is for runs of handgrad train --ema", f"no average in '{folder}'")
    expected = {f"{checkpoint.EMA}.{name}": (shape, "float32") for name, shape in names.items()}
    tensors = checkpoint.load_state(folder, expected, others=True)
    return lambda name: tensors[f"{checkpoint.EMA}.{name}"] if name in names else read(name)


def schedule_free(folder: Path, program: Program, read: Read, saved: dict) -> Read:
    """Returns what reads x of a parameter, the average, float32: from y, which `read` reads, and z in the state. A
    frozen parameter has no z: `read` reads it.

    saved: the checkpoint's run.json. Raises HandgradError if that is damaged.
    """
    beta1, held = saved["interpolation"], checkpoint.state_names(folder)
    if not isinstance(beta1, float) or not 0.0 < beta1 < 1.0:
        rule = f"{folder}/run.json gives interpolation as a number between 0 and 1"
        raise HandgradError("checkpoint", rule, repr(beta1), hint=checkpoint.OLDER)
    kinds = {"z": "float64" if saved.get("stored") == "float64" else "float32", "low": "int16"}
    expected = {
        f"{vector}.{name}": (info.tensor.shape, kind)
        for name, info in program.params.items()
        for vector, kind in kinds.items()
        if f"{vector}.{name}" in held
    }
    tensors = checkpoint.load_state(folder, expected, others=True)

    def read_x(name: str) -> np.ndarray:
        z, low, y = f"z.{name}", f"low.{name}", read(name)
        if z not in expected:
            return y
        y = y if y.dtype == np.float64 else y.astype(np.float32)
        return average(join_weight(y, tensors[low]) if low in expected else y, tensors[z], beta1)

    return read_x
