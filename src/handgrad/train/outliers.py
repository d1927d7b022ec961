"""Outliers among losses and gradient norms: llm.c's guard against spikes, by the z-score among the last values."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from handgrad.core.number import real

WINDOW = 128  # values; no score before the window is full


@dataclass(frozen=True)
class Guard:
    """The z-scores above which an update is skipped; 0: never. With any, the host waits for the norm of every step."""

    loss_z: float = 0.0
    grad_z: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss_z", "grad_z"):
            object.__setattr__(self, name, real("train", name, getattr(self, name), 0.0))

    @property
    def is_on(self) -> bool:
        """Whether the host must decide on updates."""
        return self.loss_z > 0 or self.grad_z > 0


class Outliers:
    """Remembers the last WINDOW values. `limit` is the score above which the caller should skip; 0 for never."""

    def __init__(self, limit: float):
        self.limit = limit
        self.window: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> float:
        """The score of a new value in population standard deviations, itself in the window; 0 while it fills."""
        self.window.append(value)
        if len(self.window) < WINDOW:
            return 0.0
        mean = math.fsum(self.window) / WINDOW
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in self.window) / WINDOW)
        return (value - mean) / deviation if deviation > 0 else 0.0


def skip_reason(outliers: Mapping[str, Outliers], loss: float, norm: float, is_guarded: bool) -> str:
    """Why a step's update does not happen, or nothing. outliers: of "loss" and "grad_norm"."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        if math.isfinite(norm) and not is_guarded:  # a loss beyond float32: the norm's kernel updated
            return ""
        return f"grad_norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    values = {"loss": loss, "grad_norm": norm}
    scores = {name: found.add(values[name]) for name, found in outliers.items()}
    for name, found in outliers.items():
        if scores[name] > found.limit > 0:
            what = f"{scores[name]:.1f} standard deviations above the last {len(found.window)}"
            return f"{name} {values[name]:.4g} is {what}"
    return ""
