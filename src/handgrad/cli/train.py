"""handgrad train: a training run. With --resume it keeps the settings of the run; --config reads them from a file."""

import json
import math
import os
import tomllib
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from handgrad.backends.ranks.startup import open_comm
from handgrad.cli.flags import flags, full_names, parse
from handgrad.cli.names import ALIASES, hint_for
from handgrad.cli.ranks import requested_ranks
from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError, one_line
from handgrad.train.config import SCHEDULE_FREE, SCHEDULE_SETTINGS, Config, OptimConfig, from_names
from handgrad.train.folder import SETTINGS, current, flat, leave_sizes, saved_settings
from handgrad.train.optimizers import own_settings
from handgrad.train.ranks import together
from handgrad.train.run import train
from handgrad.train.show import RANKS

NUMBERS = {f.name for f in fields(OptimConfig) if f.type in ("float", float)}
LENGTHS = ("steps", "tokens", "epochs")  # settings of which a run has one
READERS = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".toml": tomllib.loads}


def main(argv: list[str]) -> int:
    """Parses the flags, over the settings of a file, over those of a resumed run, and trains."""
    with together(open_comm(requested_ranks("train", argv))):
        c = settings(argv)
    return train(c)


def settings(argv: list[str]) -> Config:
    """The settings of a command line, over those of its file, over those of the run that it resumes."""
    alone = parse(Config, argv, "train")
    named = from_file(Path(alone.run.config)) if alone.run.config else {}
    if length(alone):  # of a file or a saved run there is another
        named = {name: value for name, value in named.items() if name not in LENGTHS}
    c = parse(Config, argv, "train", from_names(named)) if named else alone
    saved = saved_settings(c) if c.run.resume else None
    if named or saved is not None:
        values = flat(asdict(saved)) if saved else {}
        if length(alone) or length(from_names(named)):
            values = {name: value for name, value in values.items() if name not in LENGTHS}
        base = leave_sizes(from_names(values | named), alone)
        if saved:
            base = replace(base, optim=leave_settings(base.optim, saved.optim, named.keys()))
        c = parse(Config, argv, "train", base)
        c = replace(c, optim=leave_settings(c.optim, base.optim, named_by(argv)))
    return c


def named_by(argv: list[str]) -> set[str]:
    """The names of the settings that a command line gives, whatever their values."""
    flags = (word.partition("=")[0] for word in full_names(Config, argv) if word.startswith("--"))
    return {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags}


def length(c: Config) -> bool:
    """Whether the settings give the length of the run."""
    return c.run.steps is not None or bool(c.run.tokens or c.run.epochs)


def leave_settings(o: OptimConfig, base: OptimConfig, named: Collection[str]) -> OptimConfig:
    """The settings of another schedule or optimizer than in `base`: those of the former go back to their defaults.

    named: those that are given on purpose, which stay even if they equal the former
    """
    names: set[str] = set()
    if o.schedule != base.schedule:
        names |= {"final", *SCHEDULE_SETTINGS}
    if o.optimizer != base.optimizer:
        names |= {"momentum_warmup", "momentum_cooldown", *own_settings()}
    if (o.optimizer == SCHEDULE_FREE) != (base.optimizer == SCHEDULE_FREE):
        names |= {"schedule", "final", *SCHEDULE_SETTINGS}
    return replace(o, **{name: getattr(OptimConfig, name) for name in names.difference(named)})


def from_file(path: Path) -> dict[str, Any]:
    """The settings in a file, by name. Raises HandgradError if it cannot be read or holds anything else."""
    if path.suffix not in READERS:
        raise HandgradError("config", f"--config is a file {', '.join(READERS)}", f"'{path}'")
    if not os.path.exists(path):
        raise HandgradError("config", f"--config '{path}': no such file")
    require_file(path, "--config", "config")
    try:
        values = by_name(READERS[path.suffix](path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, yaml.MarkedYAMLError) as error:
        raise HandgradError("config", f"--config '{path}' is not {path.suffix[1:]}: {syntax(error)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HandgradError("config", f"--config '{path}' holds settings", one_line(error)) from None
    if path.name == SETTINGS:  # of a run, which has its own folder
        own = {"out", "resume", "config", *RANKS}
        values = {name: value for name, value in values.items() if name not in own}
    if values.get("config"):
        raise HandgradError("config", f"'{path}' names no other file of settings", repr(values["config"]))
    for name in (name for name in RANKS if values.pop(name, None)):
        rule = "ranks belong to a command: each starts its own"
        raise HandgradError("config", rule, f"'{name}' in '{path}'", hint=f"the flag --{name.replace('_', '-')}")
    known = dict(flags(Config))
    for flag in (f"--{name.replace('_', '-')}" for name in values):
        if flag not in known:
            hint = hint_for(flag, known, "train")
            raise HandgradError("config", "settings are the flags of handgrad train", f"'{flag[2:]}'", hint=hint)
    from_names(values)
    return values


def syntax(error: Exception) -> str:
    """What is wrong in a file, and in which line and column."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


def by_name(found: Any) -> dict[str, Any]:
    """Settings by name from what a file holds: groups as in a run's config.json, or names as flags spell them."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("no names and values")
    named = {name: value for name, value in found.items() if not isinstance(value, dict)}
    named |= current({name: value for name, value in found.items() if isinstance(value, dict)})
    values = {}
    for name, value in named.items():
        flag = name.replace("_", "-")
        name = ALIASES.get(flag, flag).replace("-", "_")
        values[name] = float(value) if name in NUMBERS and is_number(value) else value
    return values


def is_number(value: Any) -> bool:
    """Whether a text is a number: to YAML, 1e-3 is text."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
