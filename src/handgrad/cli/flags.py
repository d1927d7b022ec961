"""Flags from dataclasses, through tyro; a wrong flag is one line that names the nearest right one."""

import difflib
import re
from typing import TypeVar

import tyro

from handgrad.core.errors import HandgradError

Settings = TypeVar("Settings")


def parse(kind: type[Settings], argv: list[str], verb: str, default: Settings | None = None) -> Settings:
    """The settings that the command line says, over `default`. Raises HandgradError for unknown flags and bad values."""
    known = set(re.findall(r"--[a-z0-9][a-z0-9.\-]*", tyro.extras.get_parser(kind, **_default(default)).format_help()))
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag not in known and flag != "--help":
            near = difflib.get_close_matches(flag, known, 1, cutoff=0.5)
            raise HandgradError(verb, "flags are those of --help", f"'{flag}'", hint=f"did you mean {near[0]}?" if near else "")
    try:
        return tyro.cli(kind, args=argv, prog=f"handgrad {verb}", description=" ", console_outputs=True, **_default(default))
    except SystemExit as error:
        if error.code:
            raise HandgradError(verb, "flags take the values that --help names", " ".join(argv)) from None
        raise


def _default(default: object) -> dict[str, object]:
    return {} if default is None else {"default": default}
