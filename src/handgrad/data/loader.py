"""Batches of token windows as a pure function of (seed, step, rank, world).

A window is a number of consecutive ids of one shard. An `Objective` says how many, and what they become: for `Causal`,
`seq_len` inputs and the same ids shifted by one as targets. Its windows have seq_len + 1 ids and start `seq_len` apart,
so an epoch predicts every id once. A step takes the next `batch_tokens / seq_len` windows of one endless sequence that
depends on the seed alone; the number of ranks and the micro-batch size only decide which rank computes which of them,
and when. What an objective draws depends on the seed and on the window's number in the endless sequence, so it differs
from epoch to epoch. The loader keeps no state, so a resumed run needs none. Chat data have windows of whole rows
(packing.py), which are the same in every epoch.

With `shuffle`, each epoch visits its windows in the order of a keyed bijection of 0..n-1 (a Feistel network, so no
table), and shifts all window starts, so that epochs cut a small text at different places: after as many epochs as
windows start apart, every possible window has been seen exactly once (except fewer than that at the end of each shard).
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
from handgrad.data.draws import Draws, below, hashed
from handgrad.data.labels import Labels
from handgrad.data.meta import check_labels, common_meta
from handgrad.data.objectives import EMPTY, Causal, Objective, check_names
from handgrad.data.packing import Packing
from handgrad.data.shards import MARK, open_shard

_MIX_1, _MIX_2, _SHIFT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(32)
_OPEN_SHARDS = 256  # at a time: 1024 file descriptors are a common limit
_PARTNER = 0  # the stream of draws that finds second windows; those of objectives begin at 1


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
    objective: Objective = Causal(),
    packing: str = "best_fit",
) -> "Tokens":
    """Returns the `Tokens` of all shards that match the glob `pattern`, in the order of their names.

    pattern: a glob, or a folder made by `handgrad data`
    seq_len: tokens in a sequence, those of the decoder if the model has an encoder, too
    batch_tokens: seq_len times the sequences of an optimizer step, over all ranks and micro-batches
    seed: selects the order, the shifts, and what is random in an objective
    shuffle: False reads the windows in file order
    vocab_size: if given, the ids of every batch are checked against it
    overfit: every step reads the batch of the first
    split: "train" or "val", of a folder
    objective: what a window becomes: Causal, Masked, Spans, Labels or, of chat data, Chat
    packing: of chat data, the rows of a window: "best_fit": as many as fit; "none": one, and padding

    Raises HandgradError if no file matches, a shard or its marks are damaged (`open_shard`, `open_marks`), no shard
    holds a window, batch_tokens is not a multiple of seq_len, the objective has no sequences of this length, `packing`
    is "none" without Chat, or the shards' folders are of different tokenizers (`common_meta`).

    >>> import tempfile
    >>> from handgrad.data.shards import write_shard, id_dtype
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_shard(folder + "/val_0.bin", [np.arange(9)], id_dtype(9))
    ...     data = tokens(folder + "/val_*.bin", seq_len=4, batch_tokens=8, shuffle=False)
    ...     data.batch(step=0)["targets"]
    array([[1, 2, 3, 4],
           [5, 6, 7, 8]], dtype=int32)
    """
    paths = find_shards(pattern, split)
    return Tokens(pattern, paths, seq_len, batch_tokens, seed, shuffle, vocab_size, overfit, objective, packing)


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

    pattern, seq_len, batch_tokens, seed, shuffle, vocab_size, overfit, objective: as given to `tokens`
    shards: list of Shard, in the order of their names
    folder: Path of the folder that `meta` describes, else of the first shard's
    meta: content of the folder's meta.json, None without; handgrad.tokenizers.load(data.meta["tokenizer"], data.folder)
        is the tokenizer of the shards
    sequences: sequences in a step
    sequence_tokens: tokens that a model reads per sequence: seq_len, and those of the encoder if there is one
    ahead: sequences read by earlier steps minus step * sequences; 0 unless a resumed run changed its batch_tokens
    windows: sequences in an epoch
    packing: which rows the windows of chat data hold; None for other data
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
        objective: Objective,
        packing: str,
    ):
        if seq_len < 1:
            raise HandgradError("data", "seq_len must be at least 1 token", seq_len)
        if batch_tokens < seq_len or batch_tokens % seq_len:
            below = max(batch_tokens // seq_len, 1) * seq_len
            rule = f"batch_tokens must be a multiple of seq_len {seq_len}"
            raise HandgradError("data", rule, batch_tokens, hint=f"{below} or {below + seq_len} would do")
        self.pattern = str(pattern)
        self.objective = objective
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.shuffle = shuffle
        limits = [size for size in (vocab_size, objective.vocab_size) if size is not None]
        self.vocab_size = min(limits) if limits else None
        self.overfit = overfit
        self.shards = [open_shard(path) for path in paths]
        described = common_meta(paths)
        check_labels(paths)
        self.folder = described[0] if described else paths[0].parent
        self.meta = described[1] if described else None
        if (self.meta or {}).get("labels") and not isinstance(objective, Labels):
            rule = f"{self.folder} holds labelled texts, which a bert learns to classify (the objective Labels)"
            raise HandgradError("data", rule, type(objective).__name__)
        self.sequences = batch_tokens // seq_len
        self.sequence_tokens = objective.tokens(seq_len)
        self.ahead = 0
        for shard in self.shards:
            if shard.dtype == MARK:
                raise HandgradError("data", f"{pattern} names token shards", f"{shard.path}, which holds marks")
        self._length, self._apart = objective.window(seq_len)
        if packing != "best_fit" and not objective.packs:
            raise HandgradError("data", f"packing {packing} is for chat data, by Chat", type(objective).__name__)
        self.packing = Packing(self.shards, self._length, packing) if objective.packs else None
        grid = [self._grid(shard.count) for shard in self.shards]
        self._num_shifts = [shifts for _, shifts in grid]
        self._ends = self.packing.ends if self.packing else list(accumulate(windows for windows, _ in grid))
        self.windows = self._ends[-1]
        if self.windows == 0:
            longest = max(shard.count for shard in self.shards)
            rule = f"a shard must hold a window of {self._length} tokens"
            raise HandgradError("data", rule, f"{longest} in the longest of {pattern}", hint="use a shorter seq_len")
        if objective.partners and self.windows == 1:
            rule = "next_sentence takes tokens of another window: there must be two or more"
            raise HandgradError("data", rule, self.windows, hint="use a shorter seq_len")
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
        starts = count - (self._length - self._apart)  # where a window of `_apart` ids of its own may begin
        windows = max(starts // self._apart, 0)
        if not self.shuffle or self.objective.static or windows == 0:
            return windows, 1
        windows = max((starts + 1) // self._apart - 1, 1)  # one fewer, so that every shift leaves as many
        return windows, min(starts + 1 - windows * self._apart, self._apart)

    def batch(
        self,
        step: int,
        rank: int = 0,
        world: int = 1,
        *,
        micro_batch: int | None = None,
        micro_step: int = 0,
        names: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the inputs of one micro-batch of `rank` by name, int32, as the objective describes them.

        step: 0, 1, 2, ...; the result depends on neither the order of calls nor the process
        micro_batch: B, sequences per micro-batch and rank; None for all of the rank's share
        micro_step: 0 .. sequences / (world * micro_batch) - 1
        names: the inputs to fill, such as `Program.inputs`; None for all that the objective knows

        Raises HandgradError for a name that the objective cannot fill, if the step's sequences do not divide into such
        micro-batches, or if an id is not below `vocab_size`.
        """
        first, count = self.place(step, rank, world, micro_batch, micro_step)
        return self.at(first + (0 if self.overfit else self.ahead), count, names)

    def place(
        self, step: int, rank: int, world: int, micro_batch: int | None = None, micro_step: int = 0
    ) -> tuple[int, int]:
        """Returns (first, count) of the endless sequence that a micro-batch is, without `ahead`; as `batch`."""
        if micro_batch is None:
            micro_batch = max(self.sequences // world, 1)
        micro_steps, rest = divmod(self.sequences, world * micro_batch)
        if rest or micro_steps == 0:
            rule = f"batch_tokens {self.batch_tokens} must be a multiple of seq_len * micro_batch * ranks"
            raise HandgradError("data", rule, f"{self.seq_len} * {micro_batch} * {world}")
        if not (0 <= rank < world and 0 <= micro_step < micro_steps and step >= 0):
            rule = f"step, rank and micro_step must lie in 0.., 0..{world - 1} and 0..{micro_steps - 1}"
            raise HandgradError("data", rule, f"{step}, {rank} and {micro_step}")
        first = 0 if self.overfit else step * self.sequences
        return first + (micro_step * world + rank) * micro_batch, micro_batch

    def at(self, first: int, count: int, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Returns `count` sequences of the endless sequence from number `first` on, as `batch` does."""
        windows, shifts = self._order(first, count)
        numbers = windows if self.objective.static else range(first, first + count)
        return self._fill(windows, shifts, numbers, count, self._ends, self._fillable(names))

    def sweep(
        self,
        micro_batch: int,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        *,
        names: Iterable[str] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields one pass over the data in file order, as batches like those of `batch` with B = micro_batch.

        limit: stop after limit // seq_len sequences (at least one); None for all
        names: as in `batch`

        The tokens covered depend on neither micro_batch nor world, and every rank yields the same number of batches.
        Rows beyond the last sequence have ids 0 and targets IGNORE_INDEX, so a mean loss divides the sum of losses by
        the number of other targets. What is random depends on the seed and the number of the window.
        """
        names = self._fillable(names)
        spare, ends = self._length - self._apart, self._ends
        if self.packing is None:
            ends = list(accumulate(max(shard.count - spare, 0) // self._apart for shard in self.shards))
        total = ends[-1] if limit is None else min(max(limit // self.seq_len, 1), ends[-1])
        for first in range(0, total, world * micro_batch):
            begin = first + rank * micro_batch
            windows = range(begin, min(begin + micro_batch, total))
            yield self._fill(windows, [0] * len(windows), windows, micro_batch, ends, names)

    def _order(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Returns the windows and their shifts at `count` positions from `first` of the endless sequence."""
        windows: list[int] = []
        shifts: list[int] = []
        while len(windows) < count:
            epoch, begin = divmod(first + len(windows), self.windows)
            stop = min(begin + count - len(windows), self.windows)
            if self.shuffle:
                windows += _permute(np.arange(begin, stop), self.windows, self.seed, epoch).tolist()
                shift = (hashed(self.seed, 0) + epoch * _stride(self._apart)) % self._apart
            else:
                windows += range(begin, stop)
                shift = 0
            shifts += [shift] * (stop - begin)
        return windows, shifts

    def _fill(
        self,
        windows: Sequence[int],
        shifts: Sequence[int],
        numbers: Sequence[int],
        rows: int,
        ends: list[int],
        names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of `rows` sequences, of which the last may be missing.

        numbers: of the sequences, for their draws
        """
        draw, beside = Draws(self.seed, [*numbers, *[0] * (rows - len(numbers))]), None
        if self.packing:
            raw, beside = self.packing.gather(windows, rows)
            self._check(raw, windows, ends)
        else:
            raw = self._gather(windows, shifts, rows, ends)
        if self.objective.partners:
            away = 1 + below(draw(_PARTNER, [0])[: len(windows), 0], ends[-1] - 1)
            others = [(window + distance) % ends[-1] for window, distance in zip(windows, away.tolist(), strict=True)]
            beside = self._gather(others, shifts, rows, ends)
        arrays = self.objective.fill(raw, beside, draw, names)
        for name in names:
            arrays[name].reshape(rows, -1)[len(windows) :] = EMPTY.get(name, 0)
        return {name: arrays[name] for name in names}

    def _gather(self, windows: Sequence[int], shifts: Sequence[int], rows: int, ends: list[int]) -> np.ndarray:
        """Returns the ids of these windows, (rows, ids in a window) int32; 0 in rows beyond the last window."""
        ids = np.zeros((rows, self._length), np.int32)
        raw: dict[np.dtype, tuple[np.ndarray, list[int]]] = {}  # by the shards' dtype: ids as read, rows that have any
        for row, (window, shift) in enumerate(zip(windows, shifts, strict=True)):
            index = bisect_right(ends, window)
            start = (window - (ends[index - 1] if index else 0)) * self._apart + shift % self._num_shifts[index]
            opened = self._open(index)
            if opened.dtype not in raw:
                raw[opened.dtype] = np.empty(ids.shape, opened.dtype), []
            read, filled = raw[opened.dtype]
            opened.read_into(read[row], start)
            filled.append(row)
        for read, filled in raw.values():
            ids[filled] = read[filled]
        self._check(ids, windows, ends)
        return ids

    def _check(self, ids: np.ndarray, windows: Sequence[int], ends: list[int]) -> None:
        known = ids.view(np.uint32)  # uint32 ids of 2**31 and above wrapped to negative int32
        if self.vocab_size is not None and known.max() >= self.vocab_size:
            row = int(np.argmax((known >= self.vocab_size).any(axis=1)))
            path = self.shards[bisect_right(ends, windows[row])].path
            hint = "the data was made with another tokenizer than the model's"
            rule = f"{path} must hold ids below the vocabulary size {self.vocab_size}"
            raise HandgradError("data", rule, known[row].max(), hint=hint)

    def _fillable(self, names: Iterable[str] | None) -> tuple[str, ...]:
        """Returns `names` as a tuple, None as all. Raises HandgradError for one that the objective cannot fill."""
        names = self.objective.inputs if names is None else tuple(names)
        check_names(names, self.objective)
        return names


def _stride(apart: int) -> int:
    """Returns the shift per epoch: near the golden section, and coprime to `apart` so that it reaches every shift."""
    stride = max(round(0.618 * apart), 1)
    while math.gcd(stride, apart) != 1:
        stride += 1
    return stride


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
    return [np.uint64(hashed(seed, epoch, k)) for k in range(1, 5)]


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    x = (x ^ key) * _MIX_1  # wraps modulo 2**64 by design
    x ^= x >> _SHIFT
    x *= _MIX_2
    x >>= _SHIFT  # 32 bits remain, so adding a half below 2**32 cannot wrap
    return x
