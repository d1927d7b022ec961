"""The one error a user sees: `[where] rule, but got value. Context. Hint.`, or `[where] what failed. Context. Hint.`"""

import difflib
import re
from collections.abc import Iterable, Mapping

LONGEST_VALUE = 200  # characters of a value, or of a name without spaces; a file name on Linux has at most 255 bytes
LONGEST_TEXT = 1000  # characters of a rule, a context or a hint: a dozen lines of a terminal


class HandgradError(Exception):
    """A mistake that the user can correct, as a one-line message.

    where: the op, file or stage
    rule, got: for a value, what must hold and what was found instead; for a state, what failed, without `got`

    The command line prints it and exits with status 2. Values and names come from files that anybody may have written,
    so the message is printable whatever they hold: line breaks, escape sequences of terminals, marks that change the
    direction of text and lone surrogates become escapes, and long values and names lose their middle.

    >>> print(HandgradError("data", "token shards start with magic 20240520", 7, hint="handgrad data text FILE"))
    [data] token shards start with magic 20240520, but got 7. hint: handgrad data text FILE
    >>> print(HandgradError("cuda", "no NVIDIA driver found: libcuda.so.1 is missing", hint="backend 'cpu'"))
    [cuda] no NVIDIA driver found: libcuda.so.1 is missing. hint: backend 'cpu'
    >>> print(HandgradError("model", "the family is gpt2", "two\\nlines"))
    [model] the family is gpt2, but got two\\nlines.
    """

    def __init__(self, where: str, rule: str, got: object = None, *, context: str = "", hint: str = ""):
        text = f"[{_prose(where)}] {_prose(rule)}"
        if got is not None:
            text += f", but got {_shorter(_printable(_text(got)), LONGEST_VALUE)}"
        text += "."
        if context:
            text += f" {_prose(context)}."
        if hint:
            text += f" hint: {_prose(hint)}"
        super().__init__(text)
        self.where, self.rule, self.got, self.hint = where, rule, got, hint


def one_line(error: BaseException) -> str:
    """What an error says, or is if it says nothing, in one line: it may quote line breaks out of a damaged file."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str], others: Mapping[str, str] = {}) -> str:
    """The hint for a word that is none of the choices: the one that is close; empty if none is.

    others: words that mean a choice without being spelled like it

    >>> did_you_mean("CPU", ["cpu", "cuda"]), did_you_mean("gpu", ["cpu", "cuda"], {"gpu": "cuda"})
    ('did you mean cpu?', 'did you mean cuda?')
    >>> did_you_mean("chek", ["check", "grad"]), did_you_mean("x", ["check", "grad"])
    ('did you mean check?', '')
    """
    key, ours = word.lower(), {choice.lower(): choice for choice in choices if choice}
    near = [others[key]] if others.get(key) in ours else difflib.get_close_matches(key, ours, 1)
    return f"did you mean {ours[near[0]]}?" if near else ""


def _prose(text: str) -> str:
    """A sentence, printable, with its long words and the whole made shorter."""
    words = re.sub(rf"\S{{{LONGEST_VALUE + 1},}}", lambda word: _shorter(word[0], LONGEST_VALUE), _printable(text))
    return _shorter(words, LONGEST_TEXT)


def _text(value: object) -> str:
    """The value as text. An integer of thousands of digits has none in Python, nor has a list that holds one."""
    try:
        return str(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _printable(text: str) -> str:
    """The text with an escape for every character that is neither visible nor a space."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorter(text: str, limit: int) -> str:
    """The text, or its beginning and its end around the number of its characters, at most `limit` in all."""
    if len(text) <= limit:
        return text
    middle = f"...({len(text)} characters)..."
    half = (limit - len(middle)) // 2
    return text[:half] + middle + text[-half:]
