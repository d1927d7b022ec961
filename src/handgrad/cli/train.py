"""handgrad train: a training run. `handgrad train --run.resume --run.out FOLDER` goes on with the settings it began with."""

import json
from dataclasses import fields
from pathlib import Path

from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.train.config import Config
from handgrad.train.run import train


def main(argv: list[str]) -> int:
    """Parses the flags and trains."""
    return train(parse(Config, argv, "train", saved(argv)))


def saved(argv: list[str]) -> Config | None:
    """The settings saved in the run folder that is to be resumed, so that flags need not be said again."""
    words = [w for word in argv for w in word.split("=", 1)]
    if "--run.resume" not in words or "--run.out" not in words[:-1]:
        return None
    path = Path(words[words.index("--run.out") + 1]) / "config.json"
    if not path.exists():
        return None
    try:
        groups = json.loads(path.read_text())
        return Config(**{f.name: f.default_factory(**groups[f.name]) for f in fields(Config)})
    except (ValueError, KeyError, TypeError) as error:
        raise HandgradError("resume", f"'{path}' holds the settings of a run", error) from None
