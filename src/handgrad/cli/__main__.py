"""handgrad: train, generate, explain, data, ops. Every flag is a field of a dataclass; see `handgrad VERB --help`."""

import os
import sys

VERBS = {
    "train": "train a GPT-2; without arguments, a small one on Shakespeare, in about a minute",
    "generate": "continue a prompt with a trained model",
    "explain": "every call, byte and flop of a run before it runs",
    "data": "turn text into token shards",
    "ops": "the ops: support table, check, grad, bench",
}


def usage() -> str:
    """The verbs, a line each."""
    return "usage: handgrad VERB [flags]\n\n" + "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, 2 for a user's mistake (told in one line), 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    from handgrad.core.errors import HandgradError

    try:
        if argv[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(argv[0], VERBS, 1)
            raise HandgradError("handgrad", f"the verb is one of {', '.join(VERBS)}", f"'{argv[0]}'",
                                hint=f"handgrad {near[0]}" if near else "handgrad --help")
        from importlib import import_module

        return import_module(f"handgrad.cli.{argv[0]}").main(argv[1:])
    except HandgradError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("[handgrad] interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `handgrad explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
