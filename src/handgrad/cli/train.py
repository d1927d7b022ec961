"""handgrad train: a training run. With --run.resume it keeps the settings of the run."""

from handgrad.cli.flags import parse
from handgrad.train.config import Config
from handgrad.train.folder import saved_settings
from handgrad.train.run import train


def main(argv: list[str]) -> int:
    """Parses the flags, over the saved settings if a run is resumed, and trains."""
    c = parse(Config, argv, "train")
    saved = saved_settings(c) if c.run.resume else None
    return train(c if saved is None else parse(Config, argv, "train", saved))
