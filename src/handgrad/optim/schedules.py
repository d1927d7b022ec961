"""Learning-rate schedules: pure functions of the step (counted from 1), so resuming a run needs no state."""

import math
from collections.abc import Callable

from handgrad.core.errors import HandgradError

Schedule = Callable[[int], float]


def cosine(peak: float, warmup: int, steps: int, final: float = 0.1) -> Schedule:
    """Half a cosine, from the peak at the end of warm-up to final * peak at the last step.

    >>> lr = cosine(1.0, warmup=10, steps=110, final=0.1)
    >>> lr(1), lr(10), round(lr(60), 6), round(lr(110), 6)
    (0.1, 1.0, 0.55, 0.1)
    """
    return _warm(peak, warmup, lambda r: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * r)), steps)


def linear(peak: float, warmup: int, steps: int, final: float = 0.0) -> Schedule:
    """A straight line from the peak to final * peak."""
    return _warm(peak, warmup, lambda r: 1.0 - (1.0 - final) * r, steps)


def constant(peak: float, warmup: int = 0, steps: int = 0, final: float = 1.0) -> Schedule:
    """The peak after warm-up. `steps` is ignored; `final` must be 1."""
    if final != 1.0:
        raise HandgradError("schedule", "a constant schedule ends at its peak (final 1.0)", final)
    return _warm(peak, warmup, lambda r: 1.0, steps)


def wsd(peak: float, warmup: int, steps: int, final: float = 0.0, cooldown: float = 0.2) -> Schedule:
    """Warm-up, stable, decay: constant until the last fraction `cooldown` of all steps, then 1 - sqrt to final * peak.

    The shape of Hägele et al. 2024.
    """
    begin = steps * (1.0 - cooldown)

    def lr(step: int) -> float:
        if step <= warmup or step <= begin:
            return peak * min(1.0, step / max(warmup, 1))
        r = min(1.0, (step - begin) / max(steps - begin, 1e-9))
        return peak * (final + (1.0 - final) * (1.0 - math.sqrt(r)))

    return lr


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def schedule(kind: str, peak: float, warmup: int, steps: int, final: float | None = None) -> Schedule:
    """A schedule by name; `final` None: the default of that schedule."""
    if kind not in SCHEDULES:
        raise HandgradError("schedule", f"the kind is one of {', '.join(SCHEDULES)}", f"'{kind}'")
    if warmup < 0 or warmup > steps:
        raise HandgradError("schedule", f"warm-up lies between 0 and the {steps} steps of the run", warmup)
    return SCHEDULES[kind](peak, warmup, steps, **({} if final is None else {"final": final}))


def _warm(peak: float, warmup: int, shape: Callable[[float], float], steps: int) -> Schedule:
    """Linear warm-up to the peak, then peak * shape(r) while r goes from 0 to 1; constant after the last step."""

    def lr(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        return peak * shape(min(1.0, (step - warmup) / max(steps - warmup, 1)))

    return lr
