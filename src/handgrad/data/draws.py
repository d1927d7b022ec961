"""Random numbers as a function of counters. There is no state: any process draws any number, in any order."""

from collections.abc import Iterable

import numpy as np

_MASK = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HIGH, _LOW, _HALF = np.uint64(0xFFFFFFFF00000000), np.uint64(0xFFFFFFFF), np.uint64(32)


def hashed(*words: int) -> int:
    """Returns a 64-bit hash of the integers `words` (splitmix64's finalizer over a running sum)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state


class Draws:
    """The random numbers of some sequences: hashes of (seed, number of the sequence, stream, column).

    numbers: of the sequences, one per row;  stream: what the numbers are for, so that uses are independent

    >>> draw = Draws(seed=0, numbers=[7, 8])
    >>> draw(1, [0, 5]).tolist() == [[hashed(0, n, 1, 0), hashed(0, n, 1, 5)] for n in (7, 8)]
    True
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        words = np.array([number & _MASK for number in numbers], np.uint64)[:, None]
        self._rows = _absorb(np.full((1, 1), hashed(seed), np.uint64), words)

    def __call__(self, stream: int, columns: np.ndarray | list[int]) -> np.ndarray:
        """Returns (rows, k) uint64. columns: (k,), or (rows, k) if each row has its own."""
        return _absorb(_absorb(self._rows, np.full((1, 1), stream, np.uint64)), np.asarray(columns).astype(np.uint64))


def _absorb(state: np.ndarray, words: np.ndarray) -> np.ndarray:
    """One round of `hashed`, element by element; arrays wrap modulo 2**64."""
    state = state + (words + np.uint64(_GOLDEN))
    state ^= state >> np.uint64(30)
    state *= np.uint64(_MIX_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_MIX_2)
    state ^= state >> np.uint64(31)
    return state


def below(bits: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """Returns integers in 0..limit-1 from 64-bit draws, int64. limit: at most 2**31, so that the bias is small."""
    return ((bits >> _HALF) * np.asarray(limit).astype(np.uint64) >> _HALF).astype(np.int64)


def permutation(bits: np.ndarray) -> np.ndarray:
    """Returns a random order of the columns for every row, (rows, k) int64: columns sorted by their draws (rows, k)."""
    packed = (bits & _HIGH) | np.arange(bits.shape[1], dtype=np.uint64)  # sorting values is faster than argsort
    packed.sort(axis=1)
    return (packed & _LOW).astype(np.int64)
