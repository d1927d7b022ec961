"""handgrad completion SHELL: the script that completes verbs, flags and their words in bash, zsh or fish."""

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from handgrad.cli.flags import flags, parse

BASH = """\
_handgrad() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" files=1
  if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs}"; else
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
        *) words="{words}" ;;
      esac ;;"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


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
    "eval": ("cli.eval", "Eval"),
    "convert": ("cli.convert", "Convert"),
    "report": ("cli.report", "Report"),
    "explain": ("cli.explain", "Explain"),
    "profile": ("cli.profile", "Settings"),
    "data": ("cli.data", ""),
    "ops": ("cli.ops", "Ops"),
    "doctor": ("cli.doctor", "Settings"),
    "completion": ("cli.completion", "Completion"),
}


def words(verb: str) -> dict[str, tuple[str, ...]]:
    """The flags of a verb, each with the words that it takes, where these are known; words without dashes first."""
    module, name = KINDS[verb]
    loaded = import_module(f"handgrad.{module}")
    found: dict[str, tuple[str, ...]] = {}
    kinds = [getattr(loaded, name)] if name else [kind for kind, *_ in loaded.RECIPES.values()]
    if not name:
        found |= dict.fromkeys([*loaded.RECIPES, "check"], ())
    for kind in kinds:
        found |= {flag: choices(hint) for flag, hint in flags(kind)}
    return found


def choices(hint: Any) -> tuple[str, ...]:
    """The words that a flag of this type takes, none where they are not known."""
    return tuple(str(word) for word in get_args(hint) if word != "") if get_origin(hint) is Literal else ()


def bash(found: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """The script for bash; zsh reads it too."""
    cases = []
    for verb, known in found.items():
        values = [f'        {flag}) words="{" ".join(takes)}"; files= ;;' for flag, takes in known.items() if takes]
        cases.append(CASE.format(verb=verb, values="\n".join(values), words=" ".join(known)))
    return BASH.format(verbs=" ".join(found), cases="\n".join(cases))


def fish(found: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """The script for fish."""
    lines = [f"complete -c handgrad -n __fish_use_subcommand -f -a '{' '.join(found)}'"]
    for verb, known in found.items():
        inside = f"complete -c handgrad -n '__fish_seen_subcommand_from {verb}'"
        for flag, takes in known.items():
            what = f"-l {flag[2:]}" if flag.startswith("--") else f"-a {flag}"
            lines.append(f"{inside} {what}" + (f" -x -a '{' '.join(takes)}'" if takes else ""))
    return "\n".join(lines)
