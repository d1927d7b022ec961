"""handgrad: a verb, then its flags. Every flag is a field of a dataclass; see `handgrad VERB --help`."""

import difflib
import io
import os
import sys
from importlib import import_module
from importlib.metadata import version

from handgrad.core.errors import HandgradError

VERBS = {
    "train": "train a model; without flags, a small GPT-2 on Shakespeare",
    "generate": "continue a prompt with a trained model",
    "eval": "validation loss and benchmark tasks of a trained model",
    "convert": "a model between llm.c's .bin, Hugging Face folders and run folders",
    "report": "the curves and figures of a run, or of several, as a page",
    "explain": "every call, byte and flop of a run, before it runs",
    "profile": "each call's time in a step, beside its lower bound from bytes and flops",
    "data": "turn text into token shards",
    "ops": "the ops: support table, check, grad, bench",
    "doctor": "what is installed, what was found, what would run",
    "completion": "a script that completes verbs and flags in bash, zsh or fish",
}


def usage() -> str:
    """The verbs, a line each."""
    verbs = "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())
    return f"usage: handgrad VERB [flags]\n\n{verbs}\n\nflags of a verb: handgrad VERB --help"


def run(argv: list[str]) -> int:
    """Runs the verb that the first word names; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(version("handgrad"))
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, 1)
        hint = f"did you mean handgrad {near[0]}?" if near else "handgrad --help"
        raise HandgradError("handgrad", f"the verb is one of {', '.join(VERBS)}", f"'{argv[0]}'", hint=hint)
    return import_module(f"handgrad.cli.{argv[0]}").main(argv[1:])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a user's mistake (reported in one line), 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        try:
            code = run(sys.argv[1:] if argv is None else argv)
        except SystemExit:  # --help
            code = 0
        sys.stdout.flush()  # a reader that has left, as in `handgrad explain | head`, is noticed here
        return code
    except HandgradError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\n[handgrad] interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
