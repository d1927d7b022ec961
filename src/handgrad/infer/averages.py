"""What reads an average of the weights from a checkpoint: that of --ema, or that of ScheduleFree."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.io import checkpoint
from handgrad.ops.adamw.reference import join_weight
from handgrad.ops.schedule_free.reference import average

Read = Callable[[str], np.ndarray]  # a parameter by its name


def ema(folder: Path, program: Program, read: Read, saved: dict) -> Read:
    """Returns what reads a parameter's moving average, float32. A frozen parameter has none: `read` reads it.

    saved: the checkpoint's run.json. Raises HandgradError if the checkpoint holds no average.
    """
    held = _state(folder, program, {checkpoint.EMA: _float_of(saved)})
    if not held:
        raise HandgradError("model", "--ema is for runs of handgrad train --ema", f"no average in '{folder}'")
    return lambda name: held[key] if (key := f"{checkpoint.EMA}.{name}") in held else read(name)


def schedule_free(folder: Path, program: Program, read: Read, saved: dict) -> Read:
    """Returns what reads x of a parameter, the average, float32: from y, which `read` reads, and z in the state. A
    frozen parameter has no z: `read` reads it.

    saved: the checkpoint's run.json. Raises HandgradError if that is damaged.
    """
    beta1 = saved["interpolation"]
    if not isinstance(beta1, float) or not 0.0 < beta1 < 1.0:
        rule = f"{folder}/run.json gives interpolation as a number between 0 and 1"
        raise HandgradError("checkpoint", rule, repr(beta1), hint=checkpoint.OLDER)
    held = _state(folder, program, {"z": _float_of(saved), "low": "int16"})

    def read_x(name: str) -> np.ndarray:
        z, low, y = f"z.{name}", f"low.{name}", read(name)
        if z not in held:
            return y
        y = y if y.dtype == np.float64 else y.astype(np.float32)
        return average(join_weight(y, held[low]) if low in held else y, held[z], beta1)

    return read_x


def _float_of(saved: dict) -> str:
    """The dtype of a float32 vector in a checkpoint: the ref backend stores float64."""
    return "float64" if saved.get("stored") == "float64" else "float32"


def _state(folder: Path, program: Program, kinds: dict[str, str]) -> Mapping[str, np.ndarray]:
    """What a checkpoint holds of these flat vectors, whose dtypes are given, by the names of vector and parameter."""
    names, params = checkpoint.state_names(folder), program.params.items()
    wanted = {f"{v}.{name}": (info.tensor.shape, kind) for name, info in params for v, kind in kinds.items()}
    return checkpoint.load_state(folder, {name: wanted[name] for name in wanted if name in names}, others=True)
