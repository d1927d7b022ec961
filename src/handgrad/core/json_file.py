"""JSON objects from files that anyone may have written, read within bounds."""

import json
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError

# Python's objects take up to 30 times the bytes of their JSON, so this keeps a hostile file below 200 MB. The largest
# honest files read with it: the index of a model of 1,024 layers has 1.5 MB, a vocabulary of 250,000 tokens 5 MB.
MOST_BYTES = 6 << 20


def read_object(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file. Raises HandgradError(where) if there is none, or the file exceeds MOST_BYTES."""
    try:
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise HandgradError(where, f"{path} is a file of JSON", "a folder" if path.is_dir() else "no such file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise HandgradError(where, f"{path} has at most {MOST_BYTES:,} bytes", f"{size:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HandgradError(where, f"{path} is JSON", error) from None
    if not isinstance(found, dict):
        raise HandgradError(where, f"{path} holds an object", type(found).__name__)
    return found


def shown(value: object) -> str:
    """A value from a file for a message: one line of at most 80 printable characters, text without quotes."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
