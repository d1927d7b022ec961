"""Marked: a tokenizer of text in which a model's own tokens stand by name, such as the gaps of a T5's source."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np

from handgrad.tokenizers import Tokenizer


class Marked:
    """A `handgrad.tokenizers.Tokenizer` of sources and of what is written about them. The marks may lie beyond the ids
    of the tokenizer that it extends.

    marks: ids of tokens by the names that stand for them in text
    end: the id that ends every text; `encode` appends it

    >>> from handgrad.tokenizers import chars
    >>> tokenizer = Marked(chars("ab "), {"<gap>": 5}, end=7)
    >>> tokenizer.encode("a <gap> b").tolist()
    [1, 0, 5, 0, 2, 7]
    >>> tokenizer.decode([5, 1, 2])
    '<gap>ab'
    """

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[str, int], end: int):
        self.tokenizer, self.marks, self.end = tokenizer, marks, end
        self.name, self.eot, self.ends = tokenizer.name, end, (end,)
        self.begins: tuple[int, ...] = ()
        self.specials = tokenizer.specials
        self.vocab_size = max(tokenizer.vocab_size, end + 1, *(id + 1 for id in marks.values()))
        self._beyond = {id: name for name, id in marks.items() if id >= tokenizer.vocab_size}

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        pieces = re.split("(" + "|".join(map(re.escape, self.marks)) + ")", text)
        ids = [[self.marks[p]] if p in self.marks else self.tokenizer.encode(p, special) for p in pieces if p]
        return np.concatenate([*ids, [self.end]]).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        for is_beyond, run in groupby(ids, self._beyond.__contains__):
            if is_beyond:
                yield from map(self._beyond.__getitem__, run)
            else:
                yield from self.tokenizer.stream(run)

    def bytes_of(self, id: int) -> bytes:
        return self._beyond[id].encode() if id in self._beyond else self.tokenizer.bytes_of(id)

    def drawable(self) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[: self.tokenizer.vocab_size] = self.tokenizer.drawable()
        found[[*self.marks.values(), self.end]] = True
        return found

    def save(self, folder: str | Path) -> dict:
        return self.tokenizer.save(folder)
