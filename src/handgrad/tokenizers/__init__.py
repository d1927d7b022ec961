"""Text to ids and back: GPT-2's byte-level BPE, characters, BERT's WordPiece, or any tokenizer.json."""

from collections.abc import Collection
from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.tokenizers.base import Tokenizer, check_special, neutral_prompt, prompt_ids
from handgrad.tokenizers.chars import CharTokenizer, chars
from handgrad.tokenizers.chat import ChatEncoder
from handgrad.tokenizers.ends import id_list, model_ends
from handgrad.tokenizers.file import (
    FileTokenizer,
    added_ids,
    continuations,
    from_file,
    read_library,
    special_ids,
    vocabulary,
)
from handgrad.tokenizers.folder import from_folder, from_tokens, to_folder
from handgrad.tokenizers.gguf import ends_in_gguf, from_gguf, to_gguf
from handgrad.tokenizers.gpt2 import gpt2
from handgrad.tokenizers.template import TEMPLATES, OwnTemplate, template_in_folder, template_in_gguf
from handgrad.tokenizers.training import RULE, extend, measure, train

__all__ = [
    "FileTokenizer",
    "RULE",
    "TEMPLATES",
    "ChatEncoder",
    "OwnTemplate",
    "Tokenizer",
    "added_ids",
    "chars",
    "continuations",
    "check_special",
    "ends_in_gguf",
    "extend",
    "from_file",
    "from_folder",
    "from_gguf",
    "from_tokens",
    "gpt2",
    "id_list",
    "template_in_folder",
    "template_in_gguf",
    "load",
    "measure",
    "model_ends",
    "neutral_prompt",
    "special_ids",
    "prompt_ids",
    "to_folder",
    "to_gguf",
    "train",
]


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
            raise HandgradError("tokenizer", rule, shown(characters))
        return CharTokenizer(characters, _ends(spec, range(len(characters))) or ())
    if kind == "file":
        path = spec.get("path")
        if not isinstance(path, str) or not path.isprintable():
            raise HandgradError("tokenizer", "a tokenizer of kind 'file' must have a path", repr(path))
        library = read_library(Path(folder) / path)
        return FileTokenizer(library, Path(path).name, _ends(spec, vocabulary(library, path).values()))
    raise HandgradError("tokenizer", "a tokenizer's kind must be 'gpt2', 'chars' or 'file'", shown(repr(kind)))


def _ends(spec: dict, ids: Collection[int]) -> tuple[int, ...] | None:
    """The ids that end a text by a description; None if it says nothing, as those of earlier versions."""
    if "eot" not in spec:
        return None
    found = id_list(spec["eot"], "a tokenizer gives eot")
    if not set(found) <= set(ids):
        raise HandgradError("tokenizer", "the eot of a tokenizer must be among its ids", shown(spec["eot"]))
    return found
