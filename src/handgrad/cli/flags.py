"""Flags from dataclasses, through tyro; a wrong command line is one line that names the flag and what it takes.

No two flags of a verb have the same name, so a group is never needed: --steps and --run.steps are the same flag.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from handgrad.cli.examples import EXAMPLES, NOTES
from handgrad.cli.names import ALIASES, hint_for, place_of
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.train.config import OTHER_WORDS, words_of

Settings = TypeVar("Settings")
# type of a field: what its flag takes, and what reads it
TAKES: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    int | None: ("a whole number or None", lambda word: word == "None" or int(word)),
    float | None: ("a number or None", lambda word: word == "None" or float(word)),
    int | float: ("a number", float),
    int | float | None: ("a number or None", lambda word: word == "None" or float(word)),
    str: ("text", str),
    str | None: ("text", str),
    tuple[str, ...]: ("text", str),
}
EARLIER = "run"  # settings that once were in this group are still found in it


def parse(kind: type[Settings], argv: list[str], verb: str, default: Settings | None = None) -> Settings:
    """The settings of a command line, over `default`. Raises HandgradError for unknown flags and bad values."""
    words = full_names(kind, argv)
    about = "examples:" + EXAMPLES[verb].replace("\n", "\n  ") + NOTES.get(verb, "")
    read = partial(tyro.cli, kind, args=words, prog=f"handgrad {verb}", description=about)
    read = partial(read, config=(tyro.conf.OmitArgPrefixes,))
    try:
        with redirect_stderr(io.StringIO()):  # tyro explains in a box of ten lines
            return read() if default is None else read(default=default)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    raise _mistake(kind, words, verb)


def full_names(kind: type, argv: list[str]) -> list[str]:
    """The command line with the flags' own names in place of those with a group, underscores, or another trainer's."""
    groups = _groups(kind)
    known = {name for names in groups.values() for name in names}
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and len(flag) > 2:
            name = flag[2:].replace("_", "-")
            group, dot, last = name.rpartition(".")
            bare = last.removeprefix("no-")
            if dot and (bare in groups.get(group, ()) or (group == EARLIER and bare in known)):
                name = last
            if name in ALIASES and name not in known and ALIASES[name] in known:
                name = ALIASES[name]
            flag = f"--{name}"
        words.append(flag + equals + value)
    return words


def _mistake(kind: type, argv: list[str], verb: str) -> HandgradError:
    """What is wrong with this command line, in the house grammar."""
    known, left, others = dict(flags(kind)), list(argv), []  # others: words that belong to no flag
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            others.append(word)
            continue
        if flag not in known:
            return HandgradError(verb, "flags are those of --help", f"'{flag}'", hint=hint_for(flag, known, verb))
        if known[flag] is bool:
            if equals:
                return HandgradError(verb, f"{flag} takes nothing", f"'{value}'")
            continue
        takes, reads = _takes(known[flag])
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else ""
        if not value:
            return HandgradError(verb, f"{flag} takes {takes}", "nothing")
        try:
            reads(value)
        except ValueError:
            hint = did_you_mean(value, choices(known[flag]), OTHER_WORDS)
            return HandgradError(verb, f"{flag} takes {takes}", f"'{value}'", hint=hint)
        while known[flag] == tuple[str, ...] and left and not left[0].startswith("--"):
            left.pop(0)
    return _misplaced(kind, argv, others, verb)


def _misplaced(kind: type, argv: list[str], others: list[str], verb: str) -> HandgradError:
    """What is wrong with the words of a command line that belong to no flag."""
    words = {name: hint for name, hint in _fields(kind) if name.isupper()}
    for (name, hint), word in zip(words.items(), others):
        if choices(hint) and word not in choices(hint):
            near = did_you_mean(word, choices(hint))
            return HandgradError(verb, f"{name} is {_takes(hint)[0]}", f"'{word}'", hint=near)
    rule = " ".join(["after the verb come", *words, "and flags"] if words else ["after the verb come flags"])
    if argv and len(others) < len(words):
        return HandgradError(verb, rule, f"no {list(words)[len(others)]}", hint=f"handgrad {verb} --help")
    hint = place_of(others[len(words)], verb) if len(others) > len(words) else ""
    hint = hint or f"handgrad {verb} --help" + ("; for llm.c's letters: docs/from-llmc.md" if verb == "train" else "")
    return HandgradError(verb, rule, f"'{' '.join(argv)}'" if argv else "nothing", hint=hint)


def _takes(kind: Any) -> tuple[str, Callable[[str], Any]]:
    """What a flag of this type takes, in words, and a function that raises ValueError for anything else."""
    words, optional = choices(kind), type(None) in get_args(kind)
    if words:
        return "one of " + ", ".join(words) + " or None" * optional, [*words, *["None"] * optional].index
    return TAKES[kind]


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a flag of this type takes, none where they are not known."""
    return tuple(str(word) for word in words_of(kind))


def _fields(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, type) of the fields of a dataclass; positional words have their metavar, in capitals."""
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        hint, *extras = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else (hints[f.name],)
        metavar = next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), f.name.upper())
        yield metavar if tyro.conf.Positional in extras else f.name.replace("_", "-"), hint


def _groups(kind: type) -> dict[str, list[str]]:
    """The names of the flags by group; those of the dataclass itself have the group ''."""
    found: dict[str, list[str]] = {"": []}
    for name, hint in _fields(kind):
        if isinstance(hint, type) and is_dataclass(hint):
            found[name] = [inner for names in _groups(hint).values() for inner in names]
        elif not name.isupper():
            found[""].append(name)
    return found


def flags(kind: type) -> Iterator[tuple[str, Any]]:
    """(flag, type) of every flag of a dataclass and of those inside it."""
    yield "--help", bool
    for name, hint in _fields(kind):
        if isinstance(hint, type) and is_dataclass(hint):
            yield from (inner for inner in flags(hint) if inner[0] != "--help")
        elif not name.isupper():
            yield f"--{name}", hint
            if hint is bool:
                yield f"--no-{name}", bool
