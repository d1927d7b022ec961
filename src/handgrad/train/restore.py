"""Restoring: weights and the state of the optimizer from a checkpoint into an arena, if they are this trainer's."""

from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.backends.base import Arena
from handgrad.core.errors import HandgradError
from handgrad.core.program import STATE, Program
from handgrad.infer import averages
from handgrad.io import checkpoint
from handgrad.models import Model, from_dict, to_dict
from handgrad.optim import Optimizer
from handgrad.optim.ema import EMA
from handgrad.train.optimizers import optimizer_name
from handgrad.train.shards import PARAM, expected, expected_state
from handgrad.train.start import COPIES, write_copy, write_weight

FRESH = "--fresh-optimizer takes the weights alone and starts the state anew"
WEIGHTS = ("low", EMA)  # vectors that belong to the weights, whatever the optimizer


def check_model(saved: dict[str, Any], path: Path, model: Model, tuning: dict[str, Any], dtype: str) -> None:
    """Raises HandgradError unless a checkpoint is of this model and dtype, and the same parameters learn.

    tuning: as of Execution
    """
    theirs = flat_fields(to_dict(from_dict(saved, "resume", path / checkpoint.META)))
    theirs |= {"lora": saved.get("lora"), "train_only": saved.get("train_only", [])}
    for key, value in (flat_fields(to_dict(model)) | tuning).items():
        if theirs.get(key) != value:
            hint = "another run folder, or the model of the first run"
            rule = f"the checkpoint's model has {key} {theirs.get(key)}"
            raise HandgradError("resume", rule, value, context=str(path), hint=hint)
    if saved["dtype"] != dtype:
        raise HandgradError("resume", f"the checkpoint was trained with dtype {saved['dtype']}", dtype)


def flat_fields(d: dict[str, Any]) -> dict[str, Any]:
    """The family and the fields of a model's dictionary side by side."""
    return {"family": d["family"], **d["model"]}


def state_since(saved: dict[str, Any], path: Path, fresh: bool) -> int:
    """Steps that bias corrections do not count: before the optimizer's state began anew, and skipped ones.

    Raises HandgradError if run.json gives none that can be.
    """
    since, step = saved.get("state_since", 0), saved["step"]
    if fresh:
        return int(step)
    if type(since) is not int or not 0 <= since <= step:
        rule = f"{path}/{checkpoint.META} gives state_since as a step from 0 to {step}"
        raise HandgradError("resume", rule, repr(since), hint=checkpoint.OLDER)
    return since


def state_names(path: Path, mine: list[str], saved: dict[str, Any], optim: Optimizer, fresh: bool) -> list[str]:
    """Which of the tensors of my state a checkpoint gives: all, or those of the weights if the optimizer starts anew.

    An average of the weights that only one of the two has is no reason to refuse: it starts or ends here. Raises
    HandgradError for the state of another optimizer.
    """
    held = checkpoint.state_names(path)
    if fresh:
        return [name for name in mine if name in held and vector(name) in WEIGHTS]
    theirs, own = saved.get("optimizer"), optimizer_name(optim)
    if theirs not in (None, own):
        raise HandgradError("resume", f"the checkpoint's optimizer is {theirs}", own, context=str(path), hint=FRESH)
    share, other = getattr(optim, "interpolation", None), saved.get("interpolation")
    if share != other:  # of the average it would make another one
        raise HandgradError("resume", f"the checkpoint's beta1 is {other}", share, context=str(path), hint=FRESH)
    # a state that is missing is named where it is read
    vectors, found = (sorted({vector(name) for name in names} - {EMA, STATE}) for names in (mine, held))
    if vectors != found:
        rule = f"the state of {own} with these settings is {', '.join(vectors)}"
        raise HandgradError("resume", rule, ", ".join(found) or "none", context=str(path), hint=FRESH)
    return [name for name in mine if name in held or vector(name) != EMA]


def vector(name: str) -> str:
    """The flat vector, or the word for states, that begins the name of a tensor."""
    return name.partition(".")[0]


def restore(arena: Arena, p: Program, path: Path, saved: dict[str, Any], optim: Optimizer, fresh: bool) -> None:
    """Writes weights and state; what starts anew is zero, and COPIES of the weights start as the weights. Without its
    state, a run of ScheduleFree goes on from its average.

    Raises HandgradError, before anything is written, for tensors that are missing, too many, or of another shape.
    """
    mine = expected_state(arena, p)
    names = state_names(path, list(mine), saved, optim, fresh)
    weights = checkpoint.load(path, expected(arena, p, [PARAM], prefix=False))
    is_part = fresh or any(vector(name) == EMA for name in checkpoint.state_names(path) - mine.keys())
    hint = f"the optimizer's settings are those of the checkpoint, or {FRESH}"
    held = checkpoint.load_state(path, {name: mine[name] for name in names}, others=is_part, hint=hint)
    zeros = ((name, np.zeros(*mine[name])) for name in mine if name not in held)
    for key, values in chain(((f"{PARAM}.{name}", w) for name, w in weights.items()), held.items(), zeros):
        kind, _, name = key.partition(".")
        checkpoint.check_finite(path, key, values, hint=checkpoint.OLDER)
        if kind == STATE:
            arena.write(p.states[name], values)
        else:
            arena.write_part(kind, p.params[name].tensor, values)
    if fresh and saved.get("interpolation"):
        read_average = averages.schedule_free(path, p, weights.__getitem__, saved)
        for name, info in p.params.items():
            write_weight(arena, info.tensor, read_average(name))
        return
    for name, copy in product(p.params, COPIES):
        if f"{copy}.{name}" in mine and f"{copy}.{name}" not in held:
            low = held[f"low.{name}"] if f"low.{name}" in held else None
            write_copy(arena, copy, p.params[name].tensor, weights[name], low)
