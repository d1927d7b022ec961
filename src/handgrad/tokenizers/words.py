"""GPT-2's words found and looked up by numpy: several times faster than asking a library for every word.

Text repeats its words. The pattern of GPT-2 is a rule about classes of neighbouring characters, so where words begin is
a few comparisons of whole arrays; a word of up to 15 bytes is then a pair of 64-bit keys in a hash table, which holds
its ids. The library is asked once per new word, for longer words, and for stretches with characters outside
Latin, Greek, Cyrillic and common punctuation: from space to space, for GPT-2's pattern parts words before a space.
"""

import threading
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np

_LETTER, _NUMBER, _OTHER, _SPACE, _END, _EXOTIC = range(6)
_ORDINARY = [
    range(0x80, 0x250),
    range(0x370, 0x530),
    range(0x2010, 0x2028),
    range(0x2030, 0x205F),
    range(0x20A0, 0x2200),
]
_BITS = 18
_SLOTS = 2**_BITS  # of the table, 20 bytes each; emptied when there are words for half
_MOST_IDS = 2**20  # of all words known; emptied above
_LONGEST = 15  # bytes of a word in the table
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64).view(np.int64)  # odd; products wrap
_LOW = np.array([2 ** (8 * min(length, 8)) - 1 for length in range(16)], np.uint64).view(np.int64)
_HIGH = np.array([2 ** (8 * max(length - 8, 0)) - 1 for length in range(16)], np.uint64).view(np.int64)
_COUNT_BITS = 32
_COUNT = 2**_COUNT_BITS - 1


def _classes() -> np.ndarray:
    """Returns the class of every code point below 0x2200, and of all others in one more place, (8705,) uint8."""
    table = np.full(0x2201, _EXOTIC, np.uint8)
    for point in [*range(0x80), *(point for stretch in _ORDINARY for point in stretch)]:
        kind = unicodedata.category(chr(point))
        if kind not in ("Cn", "Zs", "Zl", "Zp") and point != 0x85:
            table[point] = {"L": _LETTER, "N": _NUMBER}.get(kind[0], _OTHER)
    table[[0x20, *range(0x09, 0x0E)]] = _SPACE
    return table


_CLASS = _classes()
_ONE = np.frombuffer(b"sdmt", np.uint8)
_BYTE_CLASS = np.full(256, _EXOTIC, np.uint8)
_BYTE_CLASS[:128] = _CLASS[:128]
_BYTE_CLASS[255] = _END  # occurs in no UTF-8: stands before every document


class Words:
    """encode: what gives the ids of any text, as GPT-2's library does;  eot: the id that ends a document."""

    def __init__(self, encode: Callable[[str], list[int]], eot: int):
        self._encode, self._eot = encode, eot
        self._lock = threading.Lock()
        self._clear()

    def encode(self, documents: Iterable[str]) -> np.ndarray:
        """Returns the ids of `documents`, (n,) int32, with `eot` before each. Raises UnicodeEncodeError."""
        raw = bytearray()
        for text in documents:
            raw += b"\xff"
            raw += text.encode()
        size = len(raw)
        raw += bytes(16)  # keys are read 8 bytes at a time
        text = np.frombuffer(raw, np.uint8)
        starts = _starts(text, size)
        with self._lock:
            found = self._look_up(raw, starts, np.diff(starts, append=size))
            counts = found & _COUNT
            places = np.repeat((found >> _COUNT_BITS) - np.cumsum(counts) + counts, counts)
            places += np.arange(len(places))
            return self._pool[places]

    def _clear(self) -> None:
        self._table = np.zeros((_SLOTS, 3), np.int64)  # two keys, and where the ids are, side by side in memory
        self._known: dict[bytes, int] = {}  # word: where its ids are
        self._pool = np.zeros(4096, np.int32)
        self._used = 0
        self._add(b"\xff", [self._eot])

    def _add(self, word: bytes, ids: list[int]) -> int:
        """Returns where the ids of `word` are from now on: their place in the pool and their count, in one number."""
        end = self._used + len(ids)
        while end > len(self._pool):
            self._pool = np.resize(self._pool, 2 * len(self._pool))
        self._pool[self._used : end] = ids
        self._known[word] = where = self._used << _COUNT_BITS | len(ids)
        self._used = end
        return where

    def _look_up(self, raw: bytearray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns where the ids of each word are: as the table says where both keys agree, else one by one."""
        eights = np.ndarray(len(raw) - 7, "<i8", raw, strides=(1,))
        short = np.minimum(lengths, _LONGEST)
        low = eights[starts] & _LOW[short]
        high = eights[np.minimum(starts + 8, len(eights) - 1)] & _HIGH[short] | short << 56  # "a" is not "a\0"
        slots = (low * _MIX[0] ^ high * _MIX[1]) >> (64 - _BITS) & (_SLOTS - 1)
        entries = self._table[slots]
        found = entries[:, 2].copy()
        todo = np.flatnonzero((entries[:, 0] != low) | (entries[:, 1] != high) | (lengths > _LONGEST))
        if len(self._known) > _SLOTS // 2 or self._used > _MOST_IDS:
            self._clear()
            todo = np.arange(len(starts))
        for i in todo.tolist():
            begin = int(starts[i])
            word = bytes(raw[begin : begin + int(lengths[i])])
            where = self._known.get(word)
            if where is None:
                where = self._add(word, self._encode(word.decode()))
                entry = self._table[slots[i]]
                if len(word) <= _LONGEST and not entry[1]:  # the first word of a slot keeps it
                    entry[:] = low[i], high[i], where
            found[i] = where
        return found


def _starts(padded: np.ndarray, size: int) -> np.ndarray:
    """Returns where words begin in the first `size` bytes of UTF-8, (words,) int64; two bytes more must be there."""
    text = padded[:size]
    kind = _BYTE_CLASS[text]
    high = np.flatnonzero((text >= 0xC0) & (text != 0xFF))
    if len(high):
        _classify(padded, kind, high)
    space, end = kind == _SPACE, kind == _END
    starts = np.ones(size, bool)
    np.not_equal(kind[1:], kind[:-1], out=starts[1:])
    starts[1:] &= (text[:-1] != 0x20) | space[1:]  # a space before a word belongs to it
    starts[:-1] |= space[:-1] & ~space[1:] & ~end[1:]  # so the last of many is parted from the others, if a word comes
    starts |= end
    quotes = np.flatnonzero((text == 0x27) & starts)
    if len(quotes):
        _contract(padded, starts, quotes)
    exotic = np.flatnonzero(kind == _EXOTIC)
    if len(exotic):
        _isolate(text, kind, starts, exotic)
    return np.flatnonzero(starts)


def _classify(text: np.ndarray, kind: np.ndarray, lead: np.ndarray) -> None:
    """Sets the class of characters of two and three bytes, which begin at `lead`; of four they stay exotic."""
    for low, high, more in ((0xC0, 0xE0, 1), (0xE0, 0xF0, 2)):
        at = lead[(text[lead] >= low) & (text[lead] < high)]
        point = (text[at] & (0x3F >> more)).astype(np.int32)
        for k in range(1, more + 1):
            point = point << 6 | text[at + k] & 0x3F
        found = _CLASS[np.minimum(point, len(_CLASS) - 1)]
        for k in range(more + 1):
            kind[at + k] = found


def _contract(text: np.ndarray, starts: np.ndarray, quotes: np.ndarray) -> None:
    """Parts 's 'd 'm 't 'll 've 're, where the quote begins a word, from what follows."""
    first, second = text[quotes + 1], text[quotes + 2]
    one = np.isin(first, _ONE)
    two = ((first == ord("l")) & (second == ord("l"))) | (
        ((first == ord("v")) | (first == ord("r"))) & (second == ord("e"))
    )
    starts[quotes[one | two] + 1] = False
    after = np.concatenate([quotes[one] + 2, quotes[two] + 3])
    starts[after[after < len(starts)]] = True


def _isolate(text: np.ndarray, kind: np.ndarray, starts: np.ndarray, exotic: np.ndarray) -> None:
    """Makes one word of everything between the places around an exotic character where words part for certain."""
    part = kind == _END
    part[1:] |= ((text[1:] == 0x20) | (text[1:] == 0x0A)) & (kind[:-1] < _SPACE)
    cuts = np.append(np.flatnonzero(part), len(text))
    for index in np.unique(np.searchsorted(cuts, exotic, "right")).tolist():
        begin = cuts[index - 1]
        begin += kind[begin] == _END
        starts[begin : cuts[index]] = False
        starts[begin] = True
