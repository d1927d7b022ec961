"""handgrad completion SHELL: the script that completes verbs, flags and their words in bash, zsh or fish."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import tyro

from handgrad.cli.data import RECIPES
from handgrad.cli.flags import choices, flags, parse
from handgrad.models import names
from handgrad.ops import OPS

BASH = """\
_handgrad() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" files=1
  [ "$before" != "=" ] || before="${{COMP_WORDS[COMP_CWORD-2]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs}"; files=; else
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ -z "$files" ] || [ "${{word#-}}" != "$word" ] || COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _handgrad handgrad"""
CASE = """\
    {verb})
      case "$before" in
{values}
        *) words="{words}"; if [ "$COMP_CWORD" -eq 2 ]; then {first}; else {later}; fi ;;
      esac ;;"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
PLACES: dict[str, tuple[Iterable[str], Iterable[str]]] = {  # verb: words that come first after it, and words after them
    "explain": (names(), ()),
    "profile": (names(), ()),
    "data": ((*RECIPES, "check"), ()),
    "ops": (("support", "check", "grad", "bench"), OPS),
    "completion": (("bash", "zsh", "fish"), ()),
}
VALUES = {"--preset": tuple(names()), "--tokenizer": ("gpt2", "chars"), "--init": ("random", "llmc")}
OR_FILES = ("--tokenizer", "--init")  # flags that take a file, too


@dataclass(frozen=True)
class Completion:
    """Which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")] = "bash"
    """bash, zsh or fish"""


def main(argv: list[str]) -> int:
    """Prints the script."""
    shell = parse(Completion, argv, "completion").shell
    found = {verb: words(verb) for verb in KINDS}
    print(fish(found) if shell == "fish" else (ZSH if shell == "zsh" else "") + bash(found))
    return 0


KINDS = {  # verb: the module and the name of the dataclass of its flags
    "train": ("train.config", "Config"),
    "generate": ("cli.generate", "Generate"),
    "chat": ("cli.chat", "Chats"),
    "embed": ("cli.embed", "Embed"),
    "classify": ("cli.classify", "Classify"),
    "eval": ("cli.eval", "Eval"),
    "convert": ("cli.convert", "Convert"),
    "report": ("cli.report", "Report"),
    "explain": ("cli.explain", "Explain"),
    "profile": ("cli.profile", "Profiling"),
    "data": ("cli.data", ""),
    "ops": ("cli.ops", "Ops"),
    "doctor": ("cli.doctor", "Doctor"),
    "completion": ("cli.completion", "Completion"),
}


def words(verb: str) -> dict[str, tuple[str, ...]]:
    """The flags of a verb, each with the words that it takes, where these are known."""
    module, name = KINDS[verb]
    loaded = import_module(f"handgrad.{module}")
    kinds = [getattr(loaded, name)] if name else [kind for kind, *_ in loaded.RECIPES.values()]
    return {flag: choices(hint) or VALUES.get(flag, ()) for kind in kinds for flag, hint in flags(kind)}


def bash(found: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """The script for bash; zsh reads it too."""
    cases = []
    for verb, known in found.items():
        values = [
            f'        {flag}) words="{" ".join(takes)}"{"" if flag in OR_FILES else "; files="} ;;'
            for flag, takes in known.items()
            if takes
        ]
        first, later = (f'words+=" {" ".join(w)}"; files=' if w else ":" for w in PLACES.get(verb, ((), ())))
        words = " ".join(known)
        cases.append(CASE.format(verb=verb, values="\n".join(values), words=words, first=first, later=later))
    return BASH.format(verbs=" ".join(found), cases="\n".join(cases))


def fish(found: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """The script for fish."""
    lines = [f"complete -c handgrad -n __fish_use_subcommand -f -a '{' '.join(found)}'"]
    for verb, known in found.items():
        inside = f"complete -c handgrad -n '__fish_seen_subcommand_from {verb}"
        for test, takes in zip(("-eq", "-gt"), PLACES.get(verb, ((), ()))):
            if takes:
                lines.append(f"{inside}; and test (count (commandline -opc)) {test} 2' -f -a '{' '.join(takes)}'")
        for flag, takes in known.items():
            kind = "-r" if flag in OR_FILES else "-x"
            lines.append(f"{inside}' -l {flag[2:]}" + (f" {kind} -a '{' '.join(takes)}'" if takes else ""))
    return "\n".join(lines)
