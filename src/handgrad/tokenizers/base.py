"""The Tokenizer protocol, and what its implementations share."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from handgrad.core.errors import HandgradError

# Ids lie below this: vocabularies have up to 2^18 tokens, and a table with a row per id stays small. A file may ask for
# id 2^31.
MAX_IDS = 2**24


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def name(self) -> str:
        """Short name for display, such as "gpt2"."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are in 0 .. vocab_size - 1."""
        ...

    @property
    def eot(self) -> int | None:
        """The end-of-text id, which separates documents; None if the tokenizer has none."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a text; the first is `eot`."""
        ...

    @property
    def begins(self) -> tuple[int, ...]:
        """The ids that precede every text, such as Llama's beginning-of-text; empty for most."""
        ...

    @property
    def specials(self) -> tuple[str, ...]:
        """The texts of the special tokens, which `encode` reads as such with `special`."""
        ...

    def drawable(self) -> np.ndarray:
        """Returns which ids stand for a token, (vocab_size,) bool; the others must never be sampled."""
        ...

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Returns the ids of `text`, (n,) int32, without `begins`.

        special: a special token spelled out in `text` is that token; else it is encoded as plain text
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; invalid UTF-8 becomes U+FFFD. Raises HandgradError for an id out of range."""
        ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` as they arrive, whole characters only. The pieces join to what `decode` returns."""
        ...

    def bytes_of(self, id: int) -> bytes:
        """Returns the bytes of one id; a character may begin in one token and end in the next."""
        ...

    def save(self, folder: str | Path) -> dict:
        """Returns a JSON-able description for `handgrad.tokenizers.load`; writes the files it needs into `folder`."""
        ...


def neutral_prompt(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a line break; of the end-of-text token, or of the first token, if it cannot be spelled.
    `begins` precede it.

    >>> from handgrad.tokenizers import chars
    >>> neutral_prompt(chars("hello, world"))  # its first token is the space
    [0]
    """
    try:
        ids = tokenizer.encode("\n").tolist()
    except HandgradError:
        ids = []
    if ids and "\n" in tokenizer.decode(ids):  # else it was dropped, or is an unknown token
        return [*tokenizer.begins, *ids]
    if tokenizer.begins:
        return list(tokenizer.begins)
    return [int(tokenizer.drawable().argmax()) if tokenizer.eot is None else tokenizer.eot]


def prompt_ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Returns the ids that a model reads of a text to continue: `begins`, unless it is spelled out, and the text's own.

    Empty if the text has none. special: as in `Tokenizer.encode`

    >>> from handgrad import tokenizers
    >>> prompt_ids(tokenizers.gpt2(), "<|endoftext|>", special=True)
    [50256]
    """
    ids, begins = tokenizer.encode(text, special).tolist(), list(tokenizer.begins)
    return ids if not ids or ids[: len(begins)] == begins else begins + ids


def check_special(tokenizer: Tokenizer, special: bool) -> None:
    """Raises HandgradError if special tokens are to be read, and the tokenizer has none."""
    if special and not tokenizer.specials:
        hint = "leave out --special-tokens"
        raise HandgradError(
            "tokenizer", "special tokens are read by a tokenizer that has some", tokenizer.name, hint=hint
        )


def checked(ids: Iterable[int], vocab_size: int) -> Iterator[int]:
    """Yields `ids` as ints. Raises HandgradError at the first outside 0 .. vocab_size - 1."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise HandgradError("tokenizer", f"an id must lie in 0..{vocab_size - 1}", id)
        yield int(id)


def whole_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yields the UTF-8 text of `pieces`; an incomplete character waits for its remaining bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text
    text = decoder.decode(b"", final=True)
    if text:
        yield text
