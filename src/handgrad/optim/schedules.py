"""Learning-rate schedules: pure functions of the step, so resuming a run needs no state.

Steps count from 1. Warm-up is a line that reaches the peak at step `warmup`. After it a step has the value of the shape
at r = (steps already done after warm-up) / (all steps after warm-up), as in llm.c: the first step after warm-up has the
peak, and the last one is a step short of the end of the shape. So every step learns, also with `final` 0; a step beyond
the last has the end of the shape.
"""

import math
from collections.abc import Callable

from handgrad.core.errors import HandgradError
from handgrad.core.number import I64_MAX, real, whole

Schedule = Callable[[int], float]


def cosine(peak: float, warmup: int, steps: int, final: float = 0.1) -> Schedule:
    """Half a cosine from the peak to final * peak.

    >>> lr = cosine(1.0, warmup=10, steps=110, final=0.1)
    >>> lr(1), lr(10), lr(11), round(lr(61), 6), round(lr(111), 6)
    (0.1, 1.0, 1.0, 0.55, 0.1)
    """
    final = _final(peak, final)
    return _warm(peak, warmup, steps, warmup, lambda r: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * r)))


def linear(peak: float, warmup: int, steps: int, final: float = 0.0) -> Schedule:
    """A straight line from the peak to final * peak.

    >>> lr = linear(1.0, warmup=0, steps=4)
    >>> [lr(step) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    final = _final(peak, final)
    return _warm(peak, warmup, steps, warmup, lambda r: 1.0 - (1.0 - final) * r)


def constant(peak: float, warmup: int = 0, steps: int = 0, final: float = 1.0) -> Schedule:
    """The peak after warm-up. `final` must be 1; `steps` bounds the warm-up, 0 does not."""
    if final != 1.0:
        raise HandgradError("schedule", "a constant schedule ends at its peak (final 1.0)", final)
    steps = whole("schedule", "steps", steps)
    return _warm(peak, warmup, steps or max(whole("schedule", "warmup", warmup), 1), warmup, lambda r: 1.0)


def wsd(peak: float, warmup: int, steps: int, final: float = 0.0, cooldown: float = 0.2) -> Schedule:
    """Warm-up, stable, decay: constant until the last fraction `cooldown` of all steps, then 1 - sqrt to final * peak.

    The shape of Hägele et al. 2024. Raises HandgradError if the warm-up reaches into the cooldown.
    """
    final, cooldown = _final(peak, final), real("schedule", "cooldown", cooldown, 0.0)
    if cooldown > 1.0:
        raise HandgradError("schedule", "cooldown is a fraction of the steps, at most 1", cooldown)
    begin = int((1.0 - cooldown) * whole("schedule", "steps", steps, 1) + 1e-9)  # 0.7 * 10 is 7, also as 1 - 0.3
    if whole("schedule", "warmup", warmup) > begin:
        rule = f"warm-up of wsd ends before the cooldown, which begins after step {begin} of {steps}"
        raise HandgradError("schedule", rule, f"{warmup} steps")
    return _warm(peak, warmup, steps, begin, lambda r: final + (1.0 - final) * (1.0 - math.sqrt(r)))


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def schedule(kind: str, peak: float, warmup: int, steps: int, final: float | None = None) -> Schedule:
    """A schedule by name; `final` None: the default of that schedule.

    Raises HandgradError for another name, numbers that are not finite or negative, and a warm-up that does not fit.
    """
    if kind not in SCHEDULES:
        raise HandgradError("schedule", f"the kind is one of {', '.join(SCHEDULES)}", f"'{kind}'")
    whole("schedule", "steps", steps, 1)
    return SCHEDULES[kind](peak, warmup, steps, **({} if final is None else {"final": final}))


def _final(peak: float, final: float) -> float:
    """The end of the shape as a fraction of the peak, checked."""
    fraction = real("schedule", "final", final, 0.0)
    real("schedule", "final * peak", fraction * real("schedule", "peak", peak, 0.0))
    return fraction


def _warm(peak: float, warmup: int, steps: int, begin: int, shape: Callable[[float], float]) -> Schedule:
    """Linear warm-up to the peak, the peak up to step `begin`, then peak * shape(r) with r from 0 to below 1 at step
    `steps`, and 1 after it."""
    peak, steps = real("schedule", "peak", peak, 0.0), whole("schedule", "steps", steps, 1)
    if whole("schedule", "warmup", warmup, -I64_MAX) not in range(steps + 1):
        raise HandgradError("schedule", f"warm-up lies between 0 and the {steps} steps of the run", warmup)

    def lr(step: int) -> float:
        step = whole("schedule", "step", step, 1)
        if step <= warmup:
            return peak * step / warmup
        if step <= begin:
            return peak
        return peak * shape((step - 1 - begin) / (steps - begin) if step <= steps else 1.0)

    return lr
