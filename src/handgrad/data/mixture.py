"""Several data sets as one: which set each sequence of the endless sequence is from, by weights.

Of every WINDOW consecutive sequences each set has the same number, which is its share rounded, and they are spread
evenly: after n sequences of a window, a set is never more than one ahead of its share. So the set of sequence n, and
how many earlier sequences were from it, are functions of n alone. Sequence n is the next of its set's own endless
sequence, in that set's own order.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.number import real
from handgrad.data.loader import Tokens
from handgrad.data.packing import Packing
from handgrad.data.shards import Shard

WINDOW = 1000  # sequences: shares are exact to a thousandth


class Mixture:
    """Tokens of several sets, in every part that trains the same as `Tokens` of one.

    sets: made by `tokens`, with one seq_len, batch_tokens and tokenizer; the caller compares the tokenizers
    weights: relative numbers of sequences, positive

    Raises HandgradError for weights that are not one positive number a set or leave a set out, and sets that differ.

    >>> import tempfile
    >>> from handgrad.data import id_dtype, tokens, write_shard
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, first in (("a", 0), ("b", 50)):
    ...         _ = write_shard(f"{folder}/{name}.bin", [np.arange(first, first + 41)], id_dtype(99))
    ...     sets = [tokens(f"{folder}/{name}.bin", 2, 8, shuffle=False) for name in "ab"]
    ...     Mixture(sets, [3, 1]).batch(step=0)["ids"].tolist()
    [[0, 1], [2, 3], [50, 51], [4, 5]]
    """

    def __init__(self, sets: Sequence[Tokens], weights: Sequence[float]):
        if len(weights) != len(sets) or not sets:
            raise HandgradError("data", "a mixture has one weight for each set", f"{len(weights)} for {len(sets)}")
        shares = np.array([real("data", "a weight", weight, 0.0) for weight in weights])
        if not shares.min() > 0:
            raise HandgradError("data", "the weights of a mixture are positive", f"{shares.min():g}")
        for name in ("seq_len", "batch_tokens", "sequence_tokens"):
            if len({getattr(data, name) for data in sets}) > 1:
                found = ", ".join(str(getattr(data, name)) for data in sets)
                raise HandgradError("data", f"the sets of a mixture have one {name}", found)
        self.sets, self.weights = list(sets), [float(share) for share in shares / shares.sum()]
        if any("rows" in data.objective.inputs for data in sets):  # rows of a whole batch
            raise HandgradError("data", "a mixture is of texts for next tokens or spans", "masked tokens")
        counts = _counts(shares)
        if not counts.min():
            rule = f"every set of a mixture has at least one of {WINDOW} sequences"
            raise HandgradError("data", rule, f"a weight of {shares.min():g} in {shares.sum():g}")
        self._which = _spread(counts)
        self._before = np.zeros((WINDOW + 1, len(sets)), np.int64)  # sequences of each set before one of a window
        self._before[1:] = np.cumsum(self._which[:, None] == np.arange(len(sets)), axis=0)
        first = max(self.sets, key=lambda data: len(data.objective.inputs))  # beside chats, texts fill the same inputs
        self.seq_len, self.batch_tokens, self.sequences = first.seq_len, first.batch_tokens, first.sequences
        self.sequence_tokens, self.objective, self.seed = first.sequence_tokens, first.objective, first.seed
        self.shuffle, self.overfit, self.ahead = first.shuffle, first.overfit, 0
        self.folder, self.meta = first.folder, first.meta

    def __repr__(self) -> str:
        return f"Mixture({', '.join(f'{share:.3g} of {data}' for share, data in zip(self.weights, self.sets))})"

    @property
    def pattern(self) -> str:
        """The patterns of all sets, separated by commas."""
        return ",".join(data.pattern for data in self.sets)

    @property
    def shards(self) -> list[Shard]:
        """Those of all sets."""
        return [shard for data in self.sets for shard in data.shards]

    @property
    def packing(self) -> Packing | None:
        """That of the first set of chats."""
        return next((data.packing for data in self.sets if data.packing), None)

    @property
    def windows(self) -> int:
        """Sequences until every set has been seen once."""
        return max(round(data.windows / share) for data, share in zip(self.sets, self.weights))

    @property
    def vocab_size(self) -> int | None:
        """As of `Tokens`; setting it sets that of every set."""
        return self.sets[0].vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int | None) -> None:
        for data in self.sets:
            data.vocab_size = size

    def about(self) -> str:
        """The shares, and how long a set is, in words."""
        sets = zip(self.weights, self.sets)
        return ", ".join(f"{100 * share:.1f} % {_name(data)} ({data.windows:,} sequences)" for share, data in sets)

    def epochs(self, sequences: int) -> list[float]:
        """How often each set has been seen after so many sequences."""
        window, rest = divmod(sequences, WINDOW)
        seen = window * self._before[-1] + self._before[rest]
        return [float(count) / data.windows for count, data in zip(seen, self.sets)]

    def progress(self, step: int) -> list[dict[str, Any]]:
        """What a log keeps of each set after so many steps: name, share, tokens in it, epochs, and epochs of a step."""
        sets = zip(self.sets, self.weights, self.epochs(self.ahead + step * self.sequences))
        return [
            {
                "name": _name(data),
                "share": share,
                "tokens": sum(shard.count for shard in data.shards),
                "epochs": epochs,
                "epochs_per_step": share * self.sequences / data.windows,
            }
            for data, share, epochs in sets
        ]

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
        """As `Tokens.batch`."""
        first, count = self.sets[0].place(step, rank, world, micro_batch, micro_step)
        first += 0 if self.overfit else self.ahead
        numbers = np.arange(first, first + count)
        which = self._which[numbers % WINDOW]
        found: dict[str, np.ndarray] = {}
        for k in np.unique(which):
            begin = first // WINDOW * self._before[-1, k] + self._before[first % WINDOW, k]
            rows = np.flatnonzero(which == k)  # consecutive ones of the set
            for name, values in self.sets[k].at(int(begin), len(rows), names).items():
                found.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))[rows] = values
        return found

    def sweep(
        self,
        micro_batch: int,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        *,
        names: Iterable[str] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """As `Tokens.sweep`, set after set. limit: of all tokens; each set has its share of them."""
        names = None if names is None else tuple(names)
        return chain.from_iterable(
            data.sweep(micro_batch, limit and int(limit * share), rank, world, names=names)
            for data, share in zip(self.sets, self.weights)
        )


def _name(data: Tokens) -> str:
    """The folder of a set that `handgrad data` made, else its pattern."""
    return data.pattern.removesuffix("/train_*.bin")


def _counts(shares: np.ndarray) -> np.ndarray:
    """How many of WINDOW sequences each set has: its share rounded down, and the largest remainders one more."""
    exact = shares / shares.sum() * WINDOW
    counts = np.floor(exact + 1e-9).astype(np.int64)
    for k in np.argsort(counts - exact, kind="stable")[: WINDOW - counts.sum()]:
        counts[k] += 1
    return counts


def _spread(counts: np.ndarray) -> np.ndarray:
    """(WINDOW,) the set of each sequence: always the one that is furthest behind its share."""
    which, seen = np.empty(WINDOW, np.int64), np.zeros(len(counts), np.int64)
    for n in range(WINDOW):
        which[n] = np.argmax(counts * (n + 1) - seen * WINDOW)
        seen[which[n]] += 1
    return which


Data = Tokens | Mixture  # what trains and validates
