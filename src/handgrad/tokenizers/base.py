"""What every tokenizer here can do, and the two checks they share."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from handgrad.core.errors import HandgradError


class Tokenizer(Protocol):
    """Text to ids and back.

    name: short name for people, such as "gpt2"
    vocab_size: ids lie in 0 .. vocab_size - 1
    eot: the id that ends a document, or None
    """

    name: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, (n,) int32. Text that spells a special token is ordinary text."""

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Returns the ids of `texts`, (n,) int32, with `eot` before each where there is one."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD. HandgradError for an id out of range."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` as they come, each character once it is whole; joined, it is `decode`'s."""

    def bytes_of(self, id: int) -> bytes:
        """Returns the bytes that an id stands for; a character may begin in one token and end in the next."""

    def save(self, folder: str | Path) -> dict:
        """Returns a JSON-able description for `handgrad.tokenizers.load`; puts files it needs into `folder`."""


def one_by_one(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Returns `tokenizer.encode_documents(texts)` by way of its `encode`."""
    start = np.array([] if tokenizer.eot is None else [tokenizer.eot], np.int32)
    return np.concatenate([start[:0], *(part for text in texts for part in (start, tokenizer.encode(text)))])


def checked(ids: Iterable[int], vocab_size: int) -> Iterator[int]:
    """Yields `ids` as ints, and raises HandgradError at the first that is outside 0 .. vocab_size - 1."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise HandgradError("tokenizer", f"an id must lie in 0..{vocab_size - 1}", id)
        yield int(id)


def whole_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yields the UTF-8 text of `pieces`, holding back the bytes of a character that is not complete yet."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text
    text = decoder.decode(b"", final=True)
    if text:
        yield text
