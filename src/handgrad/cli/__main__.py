"""handgrad: a verb, then its flags. Every flag is a field of a dataclass; see `handgrad VERB --help`.

What takes long to import is imported by `run`, once Ctrl-C is answered.
"""

import os
import signal
import sys
from collections.abc import Callable

VERBS = {
    "train": "train a model; without flags, a small GPT-2 on Shakespeare",
    "generate": "continue a prompt with a trained model",
    "chat": "talk to a model that was trained on chats",
    "embed": "an embedding of every line of a file, by a BERT",
    "classify": "the class of every line of a file, by a BERT that was trained on labels",
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
OTHERS = {"version": "--version", "-V": "--version", "sample": "generate", "tokenize": "data text"}  # what is meant


def usage() -> str:
    """The verbs, a line each."""
    verbs = "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())
    return f"usage: handgrad VERB [flags]\n\n{verbs}\n\nflags of a verb: handgrad VERB --help"


def run(argv: list[str], imported: Callable[[], object]) -> int:
    """Runs the verb that the first word names; returns its exit code. Calls `imported` before the verb begins."""
    import shlex
    from importlib import import_module

    from handgrad.core.errors import HandgradError, did_you_mean
    from handgrad.core.install import own_version

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(own_version())
        return 0
    if argv[0] not in VERBS:
        near = f"did you mean {OTHERS[argv[0]]}?" if argv[0] in OTHERS else did_you_mean(argv[0], VERBS)
        hint = near.replace("mean", "mean handgrad", 1) or "handgrad --help"
        if argv[0].startswith("--") and not near:  # a flag before its verb
            verb = next((word for word in argv if word in VERBS), "train")
            hint = f"handgrad {shlex.join([verb, *(word for word in argv if word != verb)])}"
        raise HandgradError("handgrad", f"the verb is one of {', '.join(VERBS)}", f"'{argv[0]}'", hint=hint)
    verb = import_module(f"handgrad.cli.{argv[0]}").main
    imported()
    return verb(argv[1:])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a user's mistake (reported in one line), 130 when interrupted."""
    imported = interrupt_at_once()
    from handgrad.core.output import Output, open_missing, redirected

    open_missing()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    out, err = Output(sys.stdout, end_verb), Output(sys.stderr)
    try:
        with redirected(out, err):
            return run_reporting(sys.argv[1:] if argv is None else argv, imported)
    finally:
        imported()
        out.end()
        err.end()


def run_reporting(argv: list[str], imported: Callable[[], object]) -> int:
    """Runs a command line and reports its error; returns the exit code."""
    from handgrad.core.errors import HandgradError

    try:
        try:
            code = run(argv, imported)
        except SystemExit as end:  # --help, or a reader that has left, as in `handgrad explain | head`
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
        return code
    except HandgradError as error:
        print(error, *getattr(error, "__notes__", ()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        exec("")  # CPython would end by SIGINT, not by 130, if it came through exec of a text, as in `dataclass`
        print(interrupted(), end="", file=sys.stderr)
        return 130
    except SystemExit:  # the reader has left at the last moment
        return 0


def end_verb(error: OSError) -> None:
    """Ends a verb whose output cannot be written: silently if its reader has left, as other commands do."""
    from handgrad.core.errors import HandgradError

    if isinstance(error, BrokenPipeError):
        raise SystemExit(0)
    raise HandgradError("handgrad", f"standard output cannot be written: {error.strerror}")


def interrupted() -> str:
    """What a command that Ctrl-C ended says: on a terminal, below the ^C that stands there."""
    return "\n" * os.isatty(2) + "[handgrad] interrupted.\n"


def interrupt_at_once() -> Callable[[], object]:
    """Has Ctrl-C end the process at once, until the function that it returns is called.

    While modules are imported there is nothing to clean up, and C extensions turn KeyboardInterrupt into other errors.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return lambda: None

    def end(*_: object) -> None:
        try:
            os.write(2, interrupted().encode())
        finally:
            os._exit(130)

    try:
        signal.signal(signal.SIGINT, end)
    except ValueError:  # only the main thread may
        return lambda: None
    return lambda: signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
