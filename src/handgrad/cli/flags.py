"""Flags from dataclasses, through tyro; a wrong command line is one line that names the flag and what it takes."""

import difflib
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from handgrad.core.errors import HandgradError

Settings = TypeVar("Settings")
# type of a field: what its flag takes, and what reads it
TAKES: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    float | None: ("a number or None", lambda word: word == "None" or float(word)),
    int | None: ("a whole number or None", lambda word: word == "None" or int(word)),
    str: ("text", str),
    tuple[str, ...]: ("text", str),
}


def parse(kind: type[Settings], argv: list[str], verb: str, default: Settings | None = None) -> Settings:
    """The settings of a command line, over `default`. Raises HandgradError for unknown flags and bad values."""
    read = partial(tyro.cli, kind, args=argv, prog=f"handgrad {verb}", description=" ")
    try:
        with redirect_stderr(io.StringIO()):  # tyro explains in a box of ten lines
            return read() if default is None else read(default=default)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    raise _mistake(kind, argv, verb)


def _mistake(kind: type, argv: list[str], verb: str) -> HandgradError:
    """What is wrong with this command line, in the house grammar."""
    known = dict(_flags(kind, "--"))
    for word, following in zip(argv, [*argv[1:], ""]):
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if not flag.startswith("--"):
            continue
        if flag not in known:
            name = flag.rpartition(".")[2].lstrip("-")
            last = {other.rpartition(".")[2].lstrip("-"): other for other in known}  # --steps is --run.steps
            near = [last[word] for word in difflib.get_close_matches(name, last, 1)]
            hint = f"did you mean {near[0]}?" if near else f"handgrad {verb} --help"
            return HandgradError(verb, "flags are those of --help", f"'{flag}'", hint=hint)
        if known[flag] is bool:
            if equals:
                return HandgradError(verb, f"{flag} takes nothing", f"'{value}'")
            continue
        value = value if equals else following
        takes, reads = _takes(known[flag])
        if not value or (not equals and value.startswith("--")):
            return HandgradError(verb, f"{flag} takes {takes}", "nothing")
        try:
            reads(value)
        except ValueError:
            return HandgradError(verb, f"{flag} takes {takes}", f"'{value}'")
    words = {name: hint for name, hint in _fields(kind) if name.isupper()}
    for (name, hint), word in zip(words.items(), argv):
        if get_origin(hint) is Literal and word not in get_args(hint):
            return HandgradError(verb, f"{name} is {_takes(hint)[0]}", f"'{word}'")
    rule = " ".join(["after the verb come", *words, "and flags"] if words else ["after the verb come flags"])
    hint = f"handgrad {verb} --help" + ("; for llm.c's letters: docs/from-llmc.md" if verb == "train" else "")
    return HandgradError(verb, rule, f"'{' '.join(argv)}'" if argv else "nothing", hint=hint)


def _takes(kind: Any) -> tuple[str, Callable[[str], Any]]:
    """What a flag of this type takes, in words, and a function that raises ValueError for anything else."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)), get_args(kind).index
    return TAKES[kind]


def _fields(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, type) of the fields of a dataclass; the names of positional words are in capitals."""
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        hint, *extras = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else (hints[f.name],)
        yield f.name.upper() if tyro.conf.Positional in extras else f.name.replace("_", "-"), hint


def _flags(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """(flag, type) of every flag of a dataclass and of those inside it."""
    yield "--help", bool
    for name, hint in _fields(kind):
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _flags(hint, f"{prefix}{name}.")
        elif not name.isupper():
            yield prefix + name, hint
            if hint is bool:
                yield f"{prefix}no-{name}", bool
