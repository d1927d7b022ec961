"""Text to ids and back: GPT-2's byte-level BPE, characters, or any tokenizer.json."""

from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.chars import CharTokenizer, chars
from handgrad.tokenizers.file import from_file
from handgrad.tokenizers.folder import from_folder, from_tokens, to_folder
from handgrad.tokenizers.gpt2 import gpt2

__all__ = ["Tokenizer", "chars", "from_file", "from_folder", "from_tokens", "gpt2", "load", "to_folder"]


def load(spec: dict, folder: str | Path = ".") -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save(folder)` described by `spec`. Raises HandgradError if it is invalid.

    >>> load(chars("abc").save(".")).encode("cab").tolist()
    [2, 0, 1]
    """
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return gpt2()
    if kind == "chars":
        characters = spec.get("characters")
        if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
            rule = "a character tokenizer must list its characters, each once"
            raise HandgradError("tokenizer", rule, repr(characters))
        return CharTokenizer(characters)
    if kind == "file":
        path = spec.get("path")
        if not isinstance(path, str):
            raise HandgradError("tokenizer", "a tokenizer of kind 'file' must have a path", repr(path))
        return from_file(Path(folder) / path)
    raise HandgradError("tokenizer", "a tokenizer's kind must be 'gpt2', 'chars' or 'file'", repr(kind))
