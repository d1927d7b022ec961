"""Packing: windows that hold whole rows of chat data, found from the marks beside the shards.

best_fit: a row goes, in file order, into the open window that it fills best; where it fits into none, the fullest is
closed. So the windows are a function of the shards and the sequence length alone, and a window's rows lie near each
other. none: a row has a window of its own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.shards import BEGINS, LEARNED, OpenShard, Shard, open_marks

METHODS = ("best_fit", "none")
_OPEN_SHARDS = 128  # at a time, each with its marks: 1024 file descriptors are a common limit
_OPEN_WINDOWS = 64  # 1 to 2 % of the windows stay empty where rows take a third, and a million rows are packed in 5 s


class Packing:
    """The windows of `length` ids that hold the rows of these shards, by a method of METHODS.

    ends: windows in the shards up to each
    rows, cut, dropped: rows in all; those longer than a window, which keep its length from their beginning; of these,
        the ones whose beginning holds nothing of the assistant's, which no window has
    filled: fraction of the windows that holds rows;  longest: ids of the longest row in them

    Raises HandgradError for another method, if a shard's marks are missing or damaged, or no row can be learned from.
    """

    def __init__(self, shards: Sequence[Shard], length: int, method: str = "best_fit"):
        if method not in METHODS:
            raise HandgradError("data", f"packing is one of {', '.join(METHODS)}", f"'{method}'")
        self.method, self.length, self.rows, self.cut, self.dropped = method, length, 0, 0, 0
        self._marks = [open_marks(shard) for shard in shards]
        self._packed = [self._pack(marks) for marks in self._marks]
        self.ends = list(accumulate(len(bounds) - 1 for _, _, bounds in self._packed))
        if not self.ends[-1]:
            rule = f"one of {self.rows:,} rows must have a token of the assistant's among its first {length:,}"
            raise HandgradError("data", rule, "none", hint="use a longer seq_len")
        self.filled = sum(int(sizes.sum()) for _, sizes, _ in self._packed) / (self.ends[-1] * length)
        self.longest = max(int(sizes.max(initial=0)) for _, sizes, _ in self._packed)
        marks = self._marks  # not self: a cycle would keep the files open until the collector runs
        self._open = lru_cache(_OPEN_SHARDS)(lambda index: (shards[index].open(), marks[index].open()))

    def __str__(self) -> str:
        lost = f", {self.dropped:,} of them left out: no token of the assistant's remains" if self.dropped else ""
        cut = f"; {self.cut:,} longer than {self.length:,} tokens and cut{lost}" if self.cut else ""
        return f"{self.rows:,} rows in {self.ends[-1]:,} windows, {100 * self.filled:.1f} % full{cut}"

    def gather(self, windows: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids int32, marks uint8) of these windows, each (rows, length), with padding: id 0, BEGINS."""
        ids = np.zeros((rows, self.length), np.int32)
        marks = np.full((rows, self.length), BEGINS, np.uint8)
        for row, window in enumerate(windows):
            index = bisect_right(self.ends, window)
            starts, sizes, bounds = self._packed[index]
            opened, opened_marks = self._open(index)
            at, number = 0, window - (self.ends[index - 1] if index else 0)
            for one in range(bounds[number], bounds[number + 1]):
                start, stop = int(starts[one]), at + int(sizes[one])
                ids[row, at:stop] = _read(opened, start, stop - at)
                opened_marks.read_into(marks[row, at:stop], start)
                at = stop
        return ids, marks

    def first_prompt(self) -> list[int]:
        """Returns the ids of the first row up to the first that is the assistant's, as it is asked for a reply."""
        ids, marks = self.gather([0], 1)
        return ids[0, : 1 + int(np.argmax(marks[0, 1:] == LEARNED))].tolist()

    def _pack(self, shard: Shard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (starts of rows, ids taken of each, where each window's rows begin and end), window by window."""
        marks = shard.read()
        starts = np.flatnonzero(marks & BEGINS)
        if marks.max() > LEARNED | BEGINS or not starts.size or starts[0] > 0:
            rule = f"{shard.path} must hold marks of 0 to {LEARNED | BEGINS}, the first of them {BEGINS} or more"
            hint = "it was changed or damaged: make it again"
            raise HandgradError("data", rule, f"{marks.max()} at most, the first {marks[0]}", hint=hint)
        sizes = np.diff(starts, append=marks.size)
        long = np.flatnonzero(sizes > self.length)
        sizes[long] = self.length
        empty = [row for row in long.tolist() if not (marks[starts[row] :][: self.length] == LEARNED).any()]
        self.rows, self.cut, self.dropped = self.rows + starts.size, self.cut + long.size, self.dropped + len(empty)
        starts, sizes = np.delete(starts, empty), np.delete(sizes, empty)
        of = np.arange(sizes.size) if self.method == "none" else _best_fit(sizes.tolist(), self.length)
        order = np.argsort(of, kind="stable")
        bounds = np.searchsorted(of[order], np.arange(of.max(initial=-1) + 2))
        return starts[order], sizes[order], bounds


def _best_fit(sizes: Sequence[int], length: int) -> np.ndarray:
    """Returns the window of each row, (rows,) int64: 0, 1, ... in the order in which windows are opened."""
    of, count = np.empty(len(sizes), np.int64), 0
    free, number = np.zeros(_OPEN_WINDOWS, np.int64), np.zeros(_OPEN_WINDOWS, np.int64)
    for row, size in enumerate(sizes):
        at = int(np.where(free >= size, free, length + 1).argmin())
        if free[at] < size:
            at = int(free.argmin())
            free[at], number[at], count = length, count, count + 1
        free[at] -= size
        of[row] = number[at]
    return of


def _read(shard: OpenShard, start: int, count: int) -> np.ndarray:
    ids = np.empty(count, shard.dtype)
    shard.read_into(ids, start)
    return ids
