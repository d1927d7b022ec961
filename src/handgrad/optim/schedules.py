"""Schedules of the learning rate and of momentum: pure functions of the step, so resuming a run needs no state.

Steps count from 1. Warm-up is a line that reaches the peak at step `warmup`. After it a step has the value of the shape
at r = (steps already done after warm-up) / (all steps after warm-up), as in llm.c: the first step after warm-up has the
peak, and the last one is a step short of the end of the shape. So every step learns, also with `final` 0; a step beyond
the last has the end of the shape. No rate after warm-up is below final * peak.

A length such as `warmup` or `cooldown` is a number of steps or, below 1, a fraction of all steps (`length`).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.number import I64_MAX, real, whole

Schedule = Callable[[int], float]
TIMESCALE = 10_000  # of inverse_sqrt without warm-up, as in transformers
COOLDOWNS: dict[str, Callable[[float], float]] = {  # shapes from 1 at r = 0 to 0 at r = 1
    "sqrt": lambda r: 1.0 - math.sqrt(r),
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
}


def length(name: str, value: float, steps: int) -> int:
    """Steps from a number of them, or from a fraction of `steps` between 0 and 1, rounded up.

    >>> length("warmup", 0.1, 64), length("warmup", 100, 64)
    (7, 100)
    """
    if isinstance(value, float) and 0.0 < value < 1.0:
        return math.ceil(value * steps - 1e-9)  # 0.1 * 70 is 7, also as 7.000000000000001
    return whole("schedule", name, int(value) if isinstance(value, float) and value.is_integer() else value, -I64_MAX)


def cosine(peak: float, warmup: float, steps: int, final: float = 0.1) -> Schedule:
    """Half a cosine from the peak to final * peak.

    >>> lr = cosine(1.0, warmup=10, steps=110, final=0.1)
    >>> lr(1), lr(10), lr(11), round(lr(61), 6), round(lr(111), 6)
    (0.1, 1.0, 1.0, 0.55, 0.1)
    """
    return _decayed(peak, warmup, steps, final, COOLDOWNS["cosine"])


def linear(peak: float, warmup: float, steps: int, final: float = 0.0) -> Schedule:
    """A straight line from the peak to final * peak.

    >>> lr = linear(1.0, warmup=0, steps=4)
    >>> [lr(step) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return _decayed(peak, warmup, steps, final, COOLDOWNS["linear"])


def polynomial(peak: float, warmup: float, steps: int, final: float = 0.0, power: float = 2.0) -> Schedule:
    """(1 - r)^power from the peak to final * peak; power 1 is `linear`."""
    power = real("schedule", "power", power, 0.0)
    return _decayed(peak, warmup, steps, final, lambda r: (1.0 - r) ** power)


def cosine_with_restarts(peak: float, warmup: float, steps: int, final: float = 0.1, cycles: int = 4) -> Schedule:
    """`cycles` cosines of equal length, each from the peak down to final * peak."""
    cycles = whole("schedule", "cycles", cycles, 1)
    return _decayed(peak, warmup, steps, final, COOLDOWNS["cosine"], cycles)


def constant(peak: float, warmup: float = 0, steps: int = 0, final: float = 1.0) -> Schedule:
    """The peak after warm-up. `final` must be 1; `steps` bounds the warm-up, 0 does not."""
    if final != 1.0:
        raise HandgradError("schedule", "a constant schedule ends at its peak (final 1.0)", final)
    steps = whole("schedule", "steps", steps)
    warmup = length("warmup", warmup, steps)
    return _warm(peak, warmup, steps or max(warmup, 1), lambda done: 1.0)


def inverse_sqrt(peak: float, warmup: float, steps: int, final: float = 0.0) -> Schedule:
    """peak * sqrt(s / step), with s the warm-up: the rate does not depend on the length of the run.

    Without warm-up s is 10,000 and the first step has the peak, as in transformers.

    >>> lr = inverse_sqrt(1.0, warmup=100, steps=1000)
    >>> lr(100), lr(101), lr(401)
    (1.0, 1.0, 0.5)
    """
    final = _final(peak, final)
    scale = length("warmup", warmup, whole("schedule", "steps", steps, 1)) or TIMESCALE
    return _warm(peak, warmup, steps, lambda done: max(math.sqrt(scale / (scale + done)), final))


def step(
    peak: float, warmup: float, steps: int, final: float = 0.0, decay_every: float = 0.25, decay_factor: float = 0.1
) -> Schedule:
    """peak * decay_factor^k after k times `decay_every` steps, counted from the end of warm-up."""
    final, every = _final(peak, final), length("decay-every", decay_every, whole("schedule", "steps", steps, 1))
    factor = real("schedule", "decay-factor", decay_factor, 0.0)
    if every < 1 or factor > 1.0:
        rule = "decay-every is at least a step, and decay-factor at most 1"
        raise HandgradError("schedule", rule, f"{decay_every} and {decay_factor}")
    return _warm(peak, warmup, steps, lambda done: max(factor ** (done // every), final))


def wsd(
    peak: float, warmup: float, steps: int, final: float = 0.0, cooldown: float = 0.2, cooldown_shape: str = "sqrt"
) -> Schedule:
    """Warm-up, stable, decay: constant until the last steps, the `cooldown`, in which it falls to final * peak.

    The cooldown's shape is "sqrt" (1 - sqrt(r), Hägele et al. 2024, as in llm.c), "linear" or "cosine". Raises
    HandgradError if the warm-up reaches into the cooldown.
    """
    final, begin = _final(peak, final), cooldown_begin(steps, cooldown)
    if cooldown_shape not in COOLDOWNS:
        raise HandgradError("schedule", f"cooldown-shape is one of {', '.join(COOLDOWNS)}", repr(cooldown_shape))
    warmup = length("warmup", warmup, steps)
    if warmup > begin:
        rule = f"warm-up of wsd ends before the cooldown, which begins after step {begin} of {steps}"
        raise HandgradError("schedule", rule, f"{warmup} steps")

    def shape(done: int) -> float:
        past = done + warmup - begin
        if past < 0:
            return 1.0
        r = past / (steps - begin) if warmup + done < steps else 1.0
        return final + (1.0 - final) * COOLDOWNS[cooldown_shape](r)

    return _warm(peak, warmup, steps, shape)


def cooldown_begin(steps: int, cooldown: float = 0.2) -> int:
    """The last step of a wsd run before its cooldown.

    >>> cooldown_begin(1000), cooldown_begin(1000, cooldown=300)
    (800, 700)
    """
    steps = whole("schedule", "steps", steps, 1)
    if isinstance(cooldown, float) and 0.0 < cooldown < 1.0:
        return int((1.0 - cooldown) * steps + 1e-9)  # 0.7 * 10 is 7, also as 1 - 0.3
    span = length("cooldown", cooldown, steps)
    if span not in range(steps + 1):
        raise HandgradError("schedule", f"the cooldown lies between 0 and the {steps} steps of the run", span)
    return steps - span


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "polynomial": polynomial,
    "step": step,
    "cosine_with_restarts": cosine_with_restarts,
}


def own_settings(kind: str) -> dict[str, Any]:
    """The settings of a schedule besides peak, warm-up and steps, with their defaults.

    >>> own_settings("wsd")
    {'final': 0.0, 'cooldown': 0.2, 'cooldown_shape': 'sqrt'}
    """
    if kind not in SCHEDULES:
        raise HandgradError("schedule", f"the kind is one of {', '.join(SCHEDULES)}", f"'{kind}'")
    parameters = list(inspect.signature(SCHEDULES[kind]).parameters.values())
    return {p.name: p.default for p in parameters[3:]}


def schedule(
    kind: str, peak: float, warmup: float, steps: int, final: float | None = None, **settings: Any
) -> Schedule:
    """A schedule by name; a setting that is None has the default of that schedule.

    Raises HandgradError for another name, a setting of another schedule, numbers that are not finite or negative, and a
    warm-up that does not fit.
    """
    own = own_settings(kind)
    whole("schedule", "steps", steps, 1)
    given = {name: value for name, value in {"final": final, **settings}.items() if value is not None}
    for name in given.keys() - own.keys():
        having = ", ".join(other for other in SCHEDULES if name in own_settings(other))
        raise HandgradError("schedule", f"{name.replace('_', '-')} is a setting of {having}", f"schedule {kind}")
    return SCHEDULES[kind](peak, warmup, steps, **given)


def settled_until(kind: str, steps: int, cooldown: float | None = None, decay_every: float | None = None) -> int:
    """The last step whose rate does not depend on the length of the run, by its schedule; 0: none after warm-up.

    >>> settled_until("wsd", 1000), settled_until("constant", 1000), settled_until("cosine", 1000)
    (800, 1000, 0)
    """
    if kind == "wsd":
        return cooldown_begin(steps, own_settings(kind)["cooldown"] if cooldown is None else cooldown)
    in_steps = kind == "step" and decay_every is not None and decay_every >= 1
    return steps if in_steps or kind in ("constant", "inverse_sqrt") else 0


def momentum(warmup: float, steps: int, cooldown: float = 0, *, peak: float = 0.95, start: float = 0.85) -> Schedule:
    """Momentum of a step: a line from `start` to `peak` over `warmup` steps, and back over the last `cooldown` steps.

    Raises HandgradError if it does not rise, or has no room for both.

    >>> at = momentum(300, 1000, cooldown=50)
    >>> [round(at(step), 6) for step in (1, 151, 301, 950, 975, 1000)]
    [0.85, 0.9, 0.95, 0.95, 0.9, 0.85]
    """
    if peak < start:
        raise HandgradError("schedule", f"a momentum that rises from {start:g} is at least that", peak)
    rise, fall = length("momentum-warmup", warmup, steps), length("momentum-cooldown", cooldown, steps)
    if min(rise, fall) < 0 or rise + fall > steps:
        rule = f"momentum rises and falls within the {steps} steps of the run"
        raise HandgradError("schedule", rule, f"{rise} and {fall} steps")

    def at(step: int) -> float:
        step = whole("schedule", "step", step, 1)
        up = min((step - 1) / rise, 1.0) if rise else 1.0
        down = min(max(steps - step, 0) / fall, 1.0) if fall else 1.0
        return start + (peak - start) * min(up, down)

    return at


def _final(peak: float, final: float) -> float:
    """The end of the shape as a fraction of the peak, checked."""
    fraction = real("schedule", "final", final, 0.0)
    real("schedule", "final * peak", fraction * real("schedule", "peak", peak, 0.0))
    return fraction


def _decayed(
    peak: float, warmup: float, steps: int, final: float, shape: Callable[[float], float], cycles: int = 1
) -> Schedule:
    """Warm-up, then from the peak to final * peak along shape(r), from 1 to 0, `cycles` times."""
    final, steps = _final(peak, final), whole("schedule", "steps", steps, 1)
    total = steps - length("warmup", warmup, steps)

    def at(done: int) -> float:
        r = cycles * done % total / total if done < total else 1.0
        return final + (1.0 - final) * shape(r)

    return _warm(peak, warmup, steps, at)


def _warm(peak: float, warmup: float, steps: int, shape: Callable[[int], float]) -> Schedule:
    """Linear warm-up to the peak, then peak * shape(steps done after warm-up)."""
    peak, steps = real("schedule", "peak", peak, 0.0), whole("schedule", "steps", steps, 1)
    rise = length("warmup", warmup, steps)
    if rise not in range(steps + 1):
        raise HandgradError("schedule", f"warm-up lies between 0 and the {steps} steps of the run", rise)

    def lr(step: int) -> float:
        step = whole("schedule", "step", step, 1)
        return peak * step / rise if step <= rise else peak * shape(step - 1 - rise)

    return lr
