"""From settings to the length of a run, and the learning rate and momentum of its steps."""

from typing import Any

import handgrad.data as hg_data
from handgrad.core.errors import HandgradError
from handgrad.optim import Optimizer, schedules
from handgrad.train.config import SCHEDULE_FREE, SCHEDULE_SETTINGS, STEPS, Config, OptimConfig, ScheduleName, num_tokens


def num_steps(c: Config, data: hg_data.Data) -> int:
    """The length of the run in steps, from --steps, --tokens or --epochs: the whole steps in it, at least one."""
    r, epoch = c.run, data.windows / data.sequences
    if r.tokens:
        return max(num_tokens(r.tokens) // data.batch_tokens, 1)
    if r.epochs or r.steps == 0:
        return max(int((r.epochs or 1.0) * epoch + 1e-9), 1)  # 0.1 * 70 is 7
    return STEPS if r.steps is None else r.steps


def steps_of(c: Config) -> int:
    """The length of the run of complete settings."""
    assert c.run.steps is not None  # `complete` has set it
    return c.run.steps


def schedule_of(c: Config) -> schedules.Schedule:
    """The learning rate of every step of complete settings. A warm-up longer than the run has its peak at the end."""
    o, steps = c.optim, steps_of(c)
    assert o.warmup is not None  # `complete` has set it
    kind = schedule_name(o)
    warmup = o.warmup if kind == "wsd" else min(o.warmup, steps)
    return schedules.schedule(kind, o.lr, warmup, steps, o.final, **schedule_settings(o))


def settled_steps(c: Config) -> int:
    """The last step of complete settings whose rate and momentum do not depend on the length of the run; 0: none."""
    o, steps = c.optim, steps_of(c)
    if (o.warmup or 0) > steps:  # the rise has been shortened
        return 0
    falls = steps - schedules.length("momentum-cooldown", o.momentum_cooldown, steps)
    return min(schedules.settled_until(schedule_name(o), steps, o.cooldown, o.decay_every), falls)


def schedule_name(o: OptimConfig) -> ScheduleName:
    """The schedule of these settings. Where it is left out: schedule_free averages, so it needs no decay."""
    return o.schedule or ("constant" if o.optimizer == SCHEDULE_FREE else "cosine")


def schedule_settings(o: OptimConfig) -> dict[str, Any]:
    """The settings of single schedules, None where they are not given."""
    return {name: getattr(o, name) for name in SCHEDULE_SETTINGS}


def momentum_of(c: Config, optim: Optimizer) -> schedules.Schedule | None:
    """The momentum of every step, None if it is not scheduled. HandgradError if the optimizer does not read it."""
    o, peak = c.optim, getattr(optim, "scheduled_momentum", None)
    if not o.momentum_warmup and not o.momentum_cooldown:
        return None
    if peak is None:
        rule = "--momentum-warmup and --momentum-cooldown are settings of optimizers whose momentum is scheduled"
        hint = "--optimizer muon, or sgd with a momentum"
        raise HandgradError("optim", rule, f"--optimizer {o.optimizer}", hint=hint)
    return schedules.momentum(o.momentum_warmup, steps_of(c), o.momentum_cooldown, peak=peak)
