"""Extending a finished run: it goes on from before its cooldown, and the cooled checkpoints are set aside."""

import shutil
from pathlib import Path

from handgrad.core.disk import flush
from handgrad.core.errors import HandgradError
from handgrad.io import checkpoint
from handgrad.train.config import Config
from handgrad.train.schedule import settled_steps

LOG = "log.jsonl"


def branch_step(saved: Config | None, c: Config, out: Path) -> int:
    """The last step of a saved run whose state an extension with these settings shares: before its cooldown,
    and before momentum falls.

    Raises HandgradError if the schedule depends on the length from its first step, or is another one, or the run
    becomes no longer.
    """
    if saved is None or saved.run.steps is None:
        raise HandgradError("resume", "--extend reads the settings of a run", f"no config.json in '{out}'")
    o, before, steps = saved.optim, saved.run.steps, c.run.steps or 0
    if steps <= before:
        raise HandgradError("resume", f"--extend makes a run longer: --steps is above its {before}", steps)
    begin = settled_steps(saved)
    if not begin:
        rule = "--extend needs a schedule whose rate does not depend on the length: wsd, constant or inverse_sqrt"
        rule += ", or step with --decay-every in steps; and a warm-up within the run"
        hint = f"--resume {out} --steps {steps} without it: the rate jumps, and the log says how"
        raise HandgradError("resume", rule, f"{o.schedule} with a warm-up of {o.warmup} steps", hint=hint)
    if c.optim.schedule != o.schedule:
        raise HandgradError("resume", f"--extend keeps the schedule of the run, {o.schedule}", c.optim.schedule)
    return begin


def set_aside(out: Path, step: int) -> str:
    """Renames the checkpoints after a step, so that no resume takes them; says where the newest is, if there was one.

    The newest keeps the log of its cooldown beside its weights. It is renamed last, so that a run that is killed in
    between resumes from it or from `step`.
    """
    later = checkpoint.complete(out)[: -len(checkpoint.complete(out, step))]
    for path in reversed(later):
        cooled = cooled_name(path)
        if (out / LOG).exists() and path == later[0]:
            shutil.copyfile(out / LOG, path / LOG)
        if cooled.exists():  # of an earlier extension
            shutil.rmtree(cooled)
        path.rename(cooled)
        flush(out)
    return f"; the cooled weights are in {cooled_name(later[0]).name}" if later else ""


def cooled_name(path: Path) -> Path:
    """The name of a checkpoint when it has been set aside."""
    return path.with_name(path.name.replace("step_", checkpoint.COOLED).removesuffix(".old"))
