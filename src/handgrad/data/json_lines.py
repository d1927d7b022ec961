"""Files of JSON lines, read within the bounds of a source: a damaged line is named, a lone surrogate is replaced."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.data.prepare.bounds import blocks

# a surrogate in JSON: an escape, or bytes that json accepts
_ENCODED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (location for error messages, object) of each line of JSON that is not blank. See `blocks`, `json_row`."""
    every = (line for _, _, lines in blocks(path) for line in lines)
    for number, line in enumerate(every, 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = json_object(json_row(line, where), where)
            yield where, whole_row(row) if _ENCODED_SURROGATE.search(line) else row


def json_row(line: bytes, where: str) -> object:
    """Returns the value of a line of JSON. Raises HandgradError if it is damaged, or nested too deeply."""
    try:
        return json.loads(line)
    except RecursionError:
        raise HandgradError("data", f"{where}: must be JSON", "lists or objects nested too deeply") from None
    except ValueError as error:
        raise HandgradError("data", f"{where}: must be JSON", error) from None


def json_object(row: object, where: str) -> dict:
    """Returns `row`. Raises HandgradError if it is no object."""
    if not isinstance(row, dict):
        raise HandgradError("data", f"{where}: must be a JSON object", json_kind(row))
    return row


def json_kind(value: object) -> str:
    """Returns what JSON calls a value."""
    kinds = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def whole_row(row: dict) -> dict:
    """Returns `row` with U+FFFD for every lone surrogate in its texts.

    >>> whole_row({"text": ["a \\ud800"]})
    {'text': ['a \ufffd']}
    """
    said = json.dumps(row, ensure_ascii=False, default=str)
    return json.loads(repaired(said)[0]) if _SURROGATE.search(said) else row


def replaced(raw: bytes) -> tuple[str, int]:
    """Returns (`raw` as UTF-8 with U+FFFD for what is none, the number of these).

    >>> replaced(b"caf\\xe9")
    ('caf\ufffd', 1)
    """
    text = raw.decode("utf-8", "replace")
    return text, text.count("\N{REPLACEMENT CHARACTER}") - raw.count("\N{REPLACEMENT CHARACTER}".encode())


def repaired(text: str) -> tuple[str, int]:
    """Returns (`text` with U+FFFD for every lone surrogate, their number), as tiktoken reads it.

    An escape in JSON can produce one; two that are a pair become their character.

    >>> repaired("a \\ud800 b")[1], repaired("\\ud83d\\ude00") == ("\\U0001f600", 0)
    (1, True)
    """
    if not _SURROGATE.search(text):
        return text, 0
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, whole.count("\N{REPLACEMENT CHARACTER}") - text.count("\N{REPLACEMENT CHARACTER}")
