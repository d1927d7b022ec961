"""One id per character, built from the training text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import checked


def chars(text: str | Iterable[str]) -> "CharTokenizer":
    """Returns a tokenizer of the characters in `text`, a string or an iterable of strings, in code point order.

    >>> tokenizer = chars("hello")
    >>> tokenizer.vocab_size, tokenizer.encode("hole").tolist(), tokenizer.decode([1, 0])
    (4, [1, 3, 2, 0], 'he')
    """
    found = set[str]()
    for piece in [text] if isinstance(text, str) else text:
        found.update(piece)
    if not found:
        raise HandgradError("tokenizer", "the text that a character tokenizer is built from must not be empty")
    return CharTokenizer("".join(sorted(found)))


class CharTokenizer:
    """A `handgrad.tokenizers.Tokenizer`, made by `chars`. `characters[id]` is the character of an id."""

    name = "chars"
    begins: tuple[int, ...] = ()
    specials: tuple[str, ...] = ()

    def __init__(self, characters: str, ends: tuple[int, ...] = ()):
        self.characters = characters
        self.ends = ends
        self.eot = ends[0] if ends else None
        self.vocab_size = len(characters)
        points = _code_points(characters)
        self._id_of = np.full(points.max() + 1, -1, np.int32)
        self._id_of[points] = np.arange(len(characters))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """As `Tokenizer.encode`; there are no special tokens.

        Raises HandgradError for a character that the tokenizer was not built from.
        """
        points = _code_points(text)
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        unknown = (ids < 0) | (points >= len(self._id_of))
        if unknown.any():
            where = int(np.argmax(unknown))
            rule = f"the text must be spelled with the {self.vocab_size} characters of the training text"
            hint = "leave it out; a model trained with the gpt2 tokenizer reads every character"
            raise HandgradError("tokenizer", rule, f"{text[where]!r} at character {where}", hint=hint)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (self.characters[id] for id in checked(ids, self.vocab_size))

    def bytes_of(self, id: int) -> bytes:
        return self.characters[id].encode("utf-8", "surrogatepass")

    def drawable(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def save(self, folder: str | Path) -> dict:
        return {"kind": "chars", "characters": self.characters} | ({"eot": list(self.ends)} if self.ends else {})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
