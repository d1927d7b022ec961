"""handgrad train: a training run. With --resume it keeps the settings of the run; --config reads them from a file."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from handgrad.backends.mpi import open_comm
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.train.config import Config, from_names
from handgrad.train.folder import SETTINGS, current, flat, leave_sizes, saved_settings
from handgrad.train.ranks import together
from handgrad.train.run import train

READERS = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".toml": tomllib.loads}


def main(argv: list[str]) -> int:
    """Parses the flags, over the settings of a resumed run and those of a file, and trains."""
    with together(open_comm()):
        c = parse(Config, argv, "train")
        saved = saved_settings(c) if c.run.resume else None
        if c.run.config:
            saved = from_file(Path(c.run.config), c, saved)
        c = c if saved is None else parse(Config, argv, "train", saved)
    return train(c)


def from_file(path: Path, c: Config, saved: Config | None) -> Config:
    """The settings in a file, over those of the resumed run if there is one: defaults of the command line `c`.

    Raises HandgradError if the file cannot be read, is of no known kind, or holds other names.
    """
    if path.suffix not in READERS:
        raise HandgradError("config", f"--config is a file {', '.join(READERS)}", f"'{path}'")
    try:
        found = READERS[path.suffix](path.read_text(encoding="utf-8"))
        values = by_name(found)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's takes several lines
        raise HandgradError("config", f"--config '{path}' holds settings", reason) from None
    if path.name == SETTINGS:  # of a run, which has its own folder
        values = {name: value for name, value in values.items() if name not in ("out", "resume", "config")}
    return leave_sizes(from_names((flat(asdict(saved)) if saved else {}) | values), c)


def by_name(found: Any) -> dict[str, Any]:
    """Settings by name from what a file holds: groups as in a run's config.json, or names; dashes are underscores."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("no names and values")
    named = {name: value for name, value in found.items() if not isinstance(value, dict)}
    named |= current({name: value for name, value in found.items() if isinstance(value, dict)})
    return {name.replace("-", "_"): value for name, value in named.items()}
