"""JSON objects from files that anyone may have written, read within bounds."""

import json
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError

# Python's objects take up to 30 times the bytes of their JSON, so this keeps a hostile file below 200 MB. The largest
# honest files read with it: the index of a model of 1,024 layers has 1.5 MB, a vocabulary of 250,000 tokens 5 MB.
MOST_BYTES = 6 << 20
MOST_OF_TOKENIZER = 16 << 20  # of a file that lists characters: all 1.1 million, each as an escape, take 13 MB


def read_object(path: Path, where: str, most: int = MOST_BYTES, hint: str = "") -> dict[str, Any]:
    """Returns the object in a JSON file of at most `most` bytes. Raises HandgradError(where, hint=hint) otherwise.

    A pipe or a device is refused before it is opened.
    """
    size = require_file(path, path.name, where, hint)
    if size > most:
        raise HandgradError(where, f"{path} must have at most {most:,} bytes", f"{size:,}", hint=hint)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HandgradError(where, f"{path} must be readable", error.strerror, hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise HandgradError(where, f"{path} must be JSON", error, hint=hint) from None
    if not isinstance(found, dict):
        raise HandgradError(where, f"{path} must hold a JSON object", type(found).__name__, hint=hint)
    return found


def shown(value: object) -> str:
    """A value from a file for a message: one line of at most 80 printable characters, text without quotes."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
