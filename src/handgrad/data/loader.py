"""Batches of token windows as a pure function of (seed, step, rank, world).

A window is `seq_len` inputs and the same ids shifted by one as targets: seq_len + 1 consecutive ids of one shard. The
windows of an epoch start `seq_len` apart, so every id is predicted once. A step takes the next
`batch_tokens / seq_len` windows of one endless sequence that depends on the seed alone; the number of ranks and the
micro-batch size only decide which rank computes which of them, and when. The loader keeps no state, so a resumed run
needs none.

With `shuffle`, each epoch visits its windows in the order of a keyed bijection of 0..n-1 (a Feistel network, so no
table), and shifts all window starts, so that epochs cut a small text at different places: after `seq_len` epochs every
possible window has been seen exactly once (except fewer than `seq_len` at the end of each shard).
"""

import glob
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data.meta import common_meta
from handgrad.data.shards import open_shard

_MASK = 2**64 - 1
_MIX_1, _MIX_2, _SHIFT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(32)
_OPEN_SHARDS = 256  # at a time: 1024 file descriptors are a common limit
INPUTS = ("ids", "targets")  # what a batch can hold


def tokens(
    pattern: str | Path,
    seq_len: int,
    batch_tokens: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    vocab_size: int | None = None,
    overfit: bool = False,
    split: str = "train",
) -> "Tokens":
    """Returns the `Tokens` of all shards that match the glob `pattern`, in the order of their names.

    pattern: a glob, or a folder made by `handgrad data`
    seq_len: tokens in a sequence
    batch_tokens: tokens in an optimizer step, over all ranks and micro-batches
    seed: selects the order and the shifts
    shuffle: False reads the windows in file order
    vocab_size: if given, the ids of every batch are checked against it
    overfit: every step reads the batch of the first
    split: "train" or "val", of a folder

    Raises HandgradError if no file matches, a shard is damaged (`open_shard`), no shard holds seq_len + 1 tokens,
    batch_tokens is not a multiple of seq_len, or the shards' folders are of different tokenizers (`common_meta`).

    >>> import tempfile
    >>> from handgrad.data.shards import write_shard, id_dtype
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_shard(folder + "/val_0.bin", [np.arange(9)], id_dtype(9))
    ...     data = tokens(folder + "/val_*.bin", seq_len=4, batch_tokens=8, shuffle=False)
    ...     data.batch(step=0)["targets"]
    array([[1, 2, 3, 4],
           [5, 6, 7, 8]], dtype=int32)
    """
    return Tokens(pattern, find_shards(pattern, split), seq_len, batch_tokens, seed, shuffle, vocab_size, overfit)


def find_shards(pattern: str | Path, split: str = "train") -> list[Path]:
    """Returns the paths of the token shards that `pattern` names, sorted.

    pattern: a glob; a folder stands for the shards of its `split`. What exists under the very name takes precedence
        over a glob's matches, so names may hold *, ? and [

    Raises HandgradError if there is none.
    """
    text = str(pattern)
    folder, name = os.path.split(text)
    if os.path.isfile(text):
        return [Path(text)]
    if os.path.isdir(text):
        folder, name = text, f"{split}_*.bin"
    found = glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name))
    if not found:
        hint = "handgrad data makes them; relative paths begin in this folder"
        if os.path.exists(os.path.join(folder, "log.jsonl")):
            hint = f"'{folder}' is a run folder; its own data, if it made any, lie in {os.path.join(folder, 'data')}"
        rule = f"at least one token shard must match {os.path.join(folder, name)}"
        raise HandgradError("data", rule, _why_none(folder), hint=hint)
    return [Path(path) for path in sorted(found)]


def _why_none(folder: str) -> str:
    """Returns why no file matches: that of the folder, if it is one that cannot be read."""
    try:
        os.scandir(folder or ".").close()
    except (FileNotFoundError, ValueError):
        return "none"
    except OSError as error:
        return f"none: {error.strerror}"
    return "none"


class Tokens:
    """The token windows of a data set, made by `tokens`.

    pattern, seq_len, batch_tokens, seed, shuffle, vocab_size, overfit: as given to `tokens`
    shards: list of Shard, in the order of their names
    folder: Path of the folder that `meta` describes, else of the first shard's
    meta: content of the folder's meta.json, None without; handgrad.tokenizers.load(data.meta["tokenizer"], data.folder)
        is the tokenizer of the shards
    sequences: sequences in a step
    ahead: sequences read by earlier steps minus step * sequences; 0 unless a resumed run changed its batch_tokens
    windows: sequences in an epoch
    """

    def __init__(
        self,
        pattern: str | Path,
        paths: Sequence[Path],
        seq_len: int,
        batch_tokens: int,
        seed: int,
        shuffle: bool,
        vocab_size: int | None,
        overfit: bool,
    ):
        if seq_len < 1:
            raise HandgradError("data", "seq_len must be at least 1 token", seq_len)
        if batch_tokens < seq_len or batch_tokens % seq_len:
            below = max(batch_tokens // seq_len, 1) * seq_len
            rule = f"batch_tokens must be a multiple of seq_len {seq_len}"
            raise HandgradError("data", rule, batch_tokens, hint=f"{below} or {below + seq_len} would do")
        self.pattern = str(pattern)
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self.overfit = overfit
        self.shards = [open_shard(path) for path in paths]
        described = common_meta(paths)
        self.folder = described[0] if described else paths[0].parent
        self.meta = described[1] if described else None
        self.sequences = batch_tokens // seq_len
        self.ahead = 0
        grid = [self._grid(shard.count) for shard in self.shards]
        self._num_shifts = [shifts for _, shifts in grid]
        self._ends = list(accumulate(windows for windows, _ in grid))
        self.windows = self._ends[-1]
        if self.windows == 0:
            longest = max(shard.count for shard in self.shards)
            rule = f"a shard must hold seq_len + 1 = {seq_len + 1} tokens"
            raise HandgradError("data", rule, f"{longest} in the longest of {pattern}", hint="use a shorter seq_len")
        shards = self.shards  # not self: a cycle would keep the files open until the collector runs
        self._open = lru_cache(_OPEN_SHARDS)(lambda index: shards[index].open())

    def __repr__(self) -> str:
        count, shards = sum(shard.count for shard in self.shards), len(self.shards)
        return (
            f"Tokens('{self.pattern}': {count:,} ids in {shards} shard{'s' * (shards != 1)}, {self.windows:,} windows"
            f" of {self.seq_len}, {self.sequences} in a step)"
        )

    def _grid(self, count: int) -> tuple[int, int]:
        """Returns (windows in an epoch, shifts that keep them inside the shard) of a shard of `count` tokens."""
        windows = (count - 1) // self.seq_len
        if not self.shuffle or windows == 0:
            return windows, 1
        windows = max(count // self.seq_len - 1, 1)  # one fewer, so that every shift leaves as many
        return windows, min(count - windows * self.seq_len, self.seq_len)

    def batch(
        self,
        step: int,
        rank: int = 0,
        world: int = 1,
        *,
        micro_batch: int | None = None,
        micro_step: int = 0,
        names: Iterable[str] = INPUTS,
    ) -> dict[str, np.ndarray]:
        """Returns the inputs of one micro-batch of `rank` by name: "ids" and "targets", each (B, seq_len) int32.

        step: 0, 1, 2, ...; the result depends on neither the order of calls nor the process
        micro_batch: B, sequences per micro-batch and rank; None for all of the rank's share
        micro_step: 0 .. sequences / (world * micro_batch) - 1
        names: the inputs to fill, such as `Program.inputs`

        Raises HandgradError for a name that the loader cannot fill, if the step's sequences do not divide into such
        micro-batches, or if an id is not below `vocab_size`.
        """
        names = _fillable(names)
        if micro_batch is None:
            micro_batch = max(self.sequences // world, 1)
        micro_steps, rest = divmod(self.sequences, world * micro_batch)
        if rest or micro_steps == 0:
            rule = f"batch_tokens {self.batch_tokens} must be a multiple of seq_len * micro_batch * ranks"
            raise HandgradError("data", rule, f"{self.seq_len} * {micro_batch} * {world}")
        if not (0 <= rank < world and 0 <= micro_step < micro_steps and step >= 0):
            rule = f"step, rank and micro_step must lie in 0.., 0..{world - 1} and 0..{micro_steps - 1}"
            raise HandgradError("data", rule, f"{step}, {rank} and {micro_step}")
        first = 0 if self.overfit else self.ahead + step * self.sequences
        first += (micro_step * world + rank) * micro_batch
        windows, offsets = self._order(first, micro_batch)
        return self._gather(windows, offsets, micro_batch, self._ends, names)

    def sweep(
        self,
        micro_batch: int,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        *,
        names: Iterable[str] = INPUTS,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields one pass over the data in file order, as batches like those of `batch` with B = micro_batch.

        limit: stop after limit // seq_len sequences (at least one); None for all
        names: as in `batch`

        The tokens covered depend on neither micro_batch nor world, and every rank yields the same number of batches.
        Rows beyond the last sequence have ids 0 and targets IGNORE_INDEX, so a mean loss divides the sum of losses by
        the number of other targets.
        """
        names = _fillable(names)
        ends = list(accumulate((shard.count - 1) // self.seq_len for shard in self.shards))
        total = ends[-1] if limit is None else min(max(limit // self.seq_len, 1), ends[-1])
        for first in range(0, total, world * micro_batch):
            begin = first + rank * micro_batch
            windows = range(begin, min(begin + micro_batch, total))
            yield self._gather(windows, [0] * len(windows), micro_batch, ends, names)

    def _order(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Returns the windows and their shifts at `count` positions from `first` of the endless sequence."""
        windows: list[int] = []
        shifts: list[int] = []
        while len(windows) < count:
            epoch, begin = divmod(first + len(windows), self.windows)
            stop = min(begin + count - len(windows), self.windows)
            if self.shuffle:
                windows += _permute(np.arange(begin, stop), self.windows, self.seed, epoch).tolist()
                shift = (_hash(self.seed, 0) + epoch * _stride(self.seq_len)) % self.seq_len
            else:
                windows += range(begin, stop)
                shift = 0
            shifts += [shift] * (stop - begin)
        return windows, shifts

    def _gather(
        self, windows: Sequence[int], shifts: Sequence[int], rows: int, ends: list[int], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        length = self.seq_len
        ids = np.zeros((rows, length), np.int32)
        targets = np.full((rows, length), IGNORE_INDEX, np.int32)
        raw: dict[np.dtype, tuple[np.ndarray, list[int]]] = {}  # by the shards' dtype: ids as read, rows that have any
        for row, (window, shift) in enumerate(zip(windows, shifts, strict=True)):
            index = bisect_right(ends, window)
            start = (window - (ends[index - 1] if index else 0)) * length + shift % self._num_shifts[index]
            opened = self._open(index)
            if opened.dtype not in raw:
                raw[opened.dtype] = np.empty((rows, length + 1), opened.dtype), []
            read, filled = raw[opened.dtype]
            opened.read_into(read[row], start)
            filled.append(row)
        for read, filled in raw.values():
            ids[filled], targets[filled] = read[filled, :-1], read[filled, 1:]
        if self.vocab_size is not None:
            self._check(ids, targets, windows, ends, self.vocab_size)
        arrays = {"ids": ids, "targets": targets}
        return {name: arrays[name] for name in names}

    def _check(
        self, ids: np.ndarray, targets: np.ndarray, windows: Sequence[int], ends: list[int], vocab_size: int
    ) -> None:
        # uint32 ids of 2**31 and above wrapped to negative int32; viewed as unsigned they are too large again
        last = targets[: len(windows)].view(np.uint32)
        if len(windows) and max(ids.view(np.uint32).max(), last.max()) >= vocab_size:
            bad = (ids.view(np.uint32)[: len(windows)] >= vocab_size) | (last >= vocab_size)
            row = int(np.argmax(bad.any(axis=1)))
            worst = max(ids.view(np.uint32)[row].max(), last[row].max())
            path = self.shards[bisect_right(ends, windows[row])].path
            hint = "the data was made with another tokenizer than the model's"
            rule = f"{path} must hold ids below the vocabulary size {vocab_size}"
            raise HandgradError("data", rule, worst, hint=hint)


def _fillable(names: Iterable[str]) -> tuple[str, ...]:
    """Returns `names` as a tuple. Raises HandgradError for the first that the loader cannot fill."""
    names = tuple(names)
    for name in names:
        if name not in INPUTS:
            raise HandgradError("data", f"token shards fill the model inputs {' and '.join(INPUTS)}", repr(name))
    return names


def _stride(seq_len: int) -> int:
    """Returns the shift per epoch: near the golden section, and coprime to seq_len so that it reaches every shift."""
    stride = max(round(0.618 * seq_len), 1)
    while math.gcd(stride, seq_len) != 1:
        stride += 1
    return stride


def _hash(*words: int) -> int:
    """Returns a 64-bit hash of the integers `words` (splitmix64's finalizer over a running sum)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _permute(x: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the images of `x` under the bijection of 0..n-1 with the key (seed, epoch).

    A Feistel network over pairs (left, right), left < a and right < b, where a * b is n or slightly more. A result
    outside 0..n-1 goes through again until it is inside (cycle walking), which keeps the map a bijection and is rare:
    a * b - n < a.
    """
    a = np.uint64(math.isqrt(n - 1) + 1)
    b = np.uint64(-(-n // int(a)))
    keys = _keys(seed, epoch)
    out = x.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while True:
        left, right = np.divmod(out[todo], b)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mix(right, even)) % a
            right = (right + _mix(left, odd)) % b
        out[todo] = left * b + right
        outside = out >= n
        if not outside.any():
            return out
        todo = outside


@lru_cache(4)
def _keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(_hash(seed, epoch, k)) for k in range(1, 5)]


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    x = (x ^ key) * _MIX_1  # wraps modulo 2**64 by design
    x ^= x >> _SHIFT
    x *= _MIX_2
    x >>= _SHIFT  # 32 bits remain, so adding a half below 2**32 cannot wrap
    return x
