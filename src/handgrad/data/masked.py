"""Masked: BERT's objective. Some tokens are hidden, and the model predicts them from both sides.

This follows BERT's create_pretraining_data.py, except where that needs sentences or memory: shards have no sentences,
and a sequence depends on its windows and its number alone. With next_sentence, therefore,

* a text is the longest document, or part of one, in a window, from its beginning. The rest of the window is skipped.
  BERT makes sequences of all chunks of a document, and puts back the sentences that a random B replaces;
* a text is cut into A and B between any two tokens. So the pair has the requested length, unless the text is shorter,
  and there is nothing to truncate. BERT adds whole sentences until they are too long, and then drops tokens at random
  ends of the longer side;
* a random B is the text of another window. If the data are few long documents, it may be of the same one.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data.draws import Draws, below, permutation

_ORDER, _ACTION, _TOKEN, _PAIR = 1, 2, 3, 4  # streams of draws
_MASKED, _KEPT = round(0.8 * 2**32), round(0.9 * 2**32)  # of 2**32: below the first [MASK], below the second unchanged
_SHORT = 0.1  # of sequences with next_sentence


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked:
    """[CLS] window [SEP], of which `rate` is predicted; with next_sentence [CLS] A [SEP] B [SEP] and padding.

    ids: (B, seq_len), of the predicted tokens 80 % are mask_id, 10 % random ids below vocab_size, 10 % unchanged
    types: (B, seq_len), 0 up to the first [SEP] and for padding, 1 for B and its [SEP]
    first, last: (B, seq_len), position n sees first[n] .. last[n] of its sequence: all that is no padding. Padding sees
        nothing: its `first` is the number of real tokens, 1 more than its `last`
    rows: (B * predictions,), where tokens are predicted, as indices into the B * seq_len positions, ascending; -1
        where a sequence has fewer than `predictions(seq_len)`
    targets: (B * predictions,), the tokens in those rows; IGNORE_INDEX where there is none
    nsp_targets: (B,), with next_sentence: 1 if B is random, 0 if it follows A
    nsp_weights: (B,) float32, with next_sentence: the sequence's predictions. Losses are divided by all predictions, so
        this makes the second loss a mean over sequences, too

    mask_id, cls_id, sep_id, pad_id: ids of [MASK], [CLS], [SEP] and [PAD]
    special_ids: ids that are never predicted, besides cls_id, sep_id, pad_id and eot
    vocab_size: random ids lie below it
    rate: a sequence of n tokens, [CLS] and [SEP] counted, has max(1, round(n * rate)) predictions, at most
        max_predictions, and fewer only if it lacks tokens, or words that fit
    max_predictions: None for round(seq_len * rate)
    whole_word: (vocab_size,) bool, whether an id continues the word before it, as ## does: words are then masked whole.
        A word that would exceed the number of predictions is skipped; each of its tokens is masked, random or unchanged
        on its own. A continuation that follows no word, but [CLS] or [SEP], is a word
    static: a window has the same masks in every epoch, and B the same source
    next_sentence: B follows A, or, half of the time, comes from another window; 10 % of the sequences are shorter
    eot: the id that begins every document in the shards. With next_sentence A and B are of one document each, without
        it; None: shards are one document

    Raises HandgradError if these settings do not fit together.

    >>> objective = Masked(mask_id=4, cls_id=2, sep_id=3, pad_id=0, vocab_size=100)
    >>> raw = np.arange(10, 16, dtype=np.int32)[None]
    >>> arrays = objective.fill(raw, None, Draws(0, [0]), objective.inputs)
    >>> arrays["ids"].tolist(), arrays["rows"].tolist(), arrays["targets"].tolist()
    ([[2, 10, 11, 12, 13, 14, 4, 3]], [6], [15])
    """

    mask_id: int
    cls_id: int
    sep_id: int
    pad_id: int
    vocab_size: int
    special_ids: Collection[int] = ()
    rate: float = 0.15
    max_predictions: int | None = None
    whole_word: np.ndarray | None = None
    static: bool = False
    next_sentence: bool = False
    eot: int | None = None
    packs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise HandgradError("data", "Masked has a rate in 0..1, ends excluded", self.rate)
        if self.max_predictions is not None and self.max_predictions < 1:
            raise HandgradError("data", "Masked has max_predictions of at least 1", self.max_predictions)
        for id in (self.mask_id, *self._special):
            if not 0 <= id < self.vocab_size:
                raise HandgradError("data", f"the ids of Masked lie below its vocab_size {self.vocab_size}", id)
        word = self.whole_word
        if word is not None and (word.shape != (self.vocab_size,) or word.dtype != bool):
            rule = f"whole_word of Masked is an array of {self.vocab_size} bool"
            raise HandgradError("data", rule, f"{word.shape} {word.dtype}")

    @cached_property
    def _special(self) -> list[int]:
        """Ids that are never predicted."""
        eot = [] if self.eot is None else [self.eot]
        return sorted({self.cls_id, self.sep_id, self.pad_id, *self.special_ids, *eot})

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ("ids", "types", "first", "last", "rows", "targets")
        return (*names, "nsp_targets", "nsp_weights") if self.next_sentence else names

    @property
    def largest_id(self) -> int:
        return self.vocab_size - 1

    @property
    def partners(self) -> bool:
        return self.next_sentence

    def predictions(self, seq_len: int) -> int:
        """Returns the rows that a sequence has in `rows` and `targets`."""
        return self.max_predictions or max(round(seq_len * self.rate), 1)

    def window(self, seq_len: int) -> tuple[int, int]:
        least = 5 if self.next_sentence else 3
        if seq_len < least or seq_len < self.predictions(seq_len):
            rule = f"a sequence of Masked has {max(least, self.predictions(seq_len))} tokens or more"
            raise HandgradError("data", rule, f"seq_len {seq_len}")
        raw = seq_len - 3 if self.next_sentence else seq_len - 2
        return raw, raw

    def tokens(self, seq_len: int) -> int:
        return seq_len

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        if beside is None:
            arrays = self._single(raw)
        else:
            arrays = self._pair(raw, beside, draw)
        ids, count = arrays["ids"], arrays.pop("count")
        T = ids.shape[1]
        if "first" in names or "last" in names:
            arrays |= bounds(count, T)
        at = self._chosen(ids, count[:, 0], draw)
        found = at < T
        rows = np.where(found, at + T * np.arange(len(at))[:, None], -1).astype(np.int32)
        arrays["targets"] = np.full(rows.size, IGNORE_INDEX, np.int32)
        hidden, flat = rows[found], ids.reshape(-1)
        arrays["targets"][found.ravel()] = flat[hidden]
        action = (draw(_ACTION, at) >> np.uint64(32))[found]
        token = np.where(action < _MASKED, self.mask_id, below(draw(_TOKEN, at), self.vocab_size)[found])
        flat[hidden] = np.where((action >= _MASKED) & (action < _KEPT), flat[hidden], token)
        return arrays | {"rows": rows.reshape(-1), "nsp_weights": found.sum(axis=1, dtype=np.float32)}

    def _single(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Returns ids and types of [CLS] window [SEP], and "count", (B, 1), of their tokens."""
        ids = np.empty((len(raw), raw.shape[1] + 2), np.int32)
        ids[:, 0], ids[:, 1:-1], ids[:, -1] = self.cls_id, raw, self.sep_id
        return {"ids": ids, "types": np.zeros_like(ids), "count": np.full((len(raw), 1), ids.shape[1], np.int32)}

    def _pair(self, raw: np.ndarray, partner: np.ndarray, draw: Draws) -> dict[str, np.ndarray]:
        """Returns ids and types of [CLS] A [SEP] B [SEP], nsp_targets, and "count", (B, 1), of tokens but padding."""
        B, most = raw.shape
        is_short, shorter, cut, is_random = draw(_PAIR, [0, 1, 2, 3]).T
        target = np.where(below(is_short, 2**31) < _SHORT * 2**31, 2 + below(shorter, most - 1), most)
        begin, length = self._text(raw)
        length = np.minimum(length, target)
        other_begin, other_length = self._text(partner)
        is_next = (is_random >> np.uint64(63) == 0) & (length > 1)
        a = 1 + below(cut, np.maximum(length - 1, 1))
        b = np.where(is_next, length - a, np.minimum(other_length, target - a))
        place = np.arange(most + 3) - 1  # in A, from its beginning
        beyond = place - (a + 1)[:, None]  # in B
        in_a, in_b = (place >= 0) & (place < a[:, None]), (beyond >= 0) & (beyond < b[:, None])
        source = np.where(is_next, begin + a, B * most + other_begin)[:, None] + beyond
        first_row = most * np.arange(B)[:, None]
        index = first_row + np.where(in_a, begin[:, None] + place, np.where(in_b, source, 0))
        ids = np.concatenate([raw, partner]).ravel()[index]
        ids[~(in_a | in_b)] = self.pad_id
        each, count = np.arange(B), (a + b + 3)[:, None]
        ids[:, 0] = self.cls_id
        ids[each, a + 1] = ids[each, a + b + 2] = self.sep_id
        types = (beyond >= 0) & (place + 1 < count)
        labels = np.where(is_next, 0, 1).astype(np.int32)
        return {"ids": ids, "types": types.astype(np.int32), "count": count.astype(np.int32), "nsp_targets": labels}

    def _text(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns begin and length, (B,), of the longest part of every window that has no eot; all if it is all eot."""
        here = np.arange(raw.shape[1])
        begin = np.maximum.accumulate(np.where(raw == self.eot, here + 1, 0), axis=1)
        length = here + 1 - begin
        end = np.argmax(length, axis=1)
        longest = length[np.arange(len(raw)), end]
        return np.where(longest > 0, end + 1 - longest, 0), np.where(longest > 0, longest, raw.shape[1])

    def _chosen(self, ids: np.ndarray, count: np.ndarray, draw: Draws) -> np.ndarray:
        """Returns the positions to predict, ascending, (B, predictions); seq_len where a sequence has no more."""
        B, T = ids.shape
        here, most = np.arange(T, dtype=np.int32), self.predictions(T)
        free = np.ones(ids.shape, bool)
        for id in self._special:
            free &= ids != id
        begins = free.copy()  # a word: a free token, and those that continue it
        if self.whole_word is not None:
            begins[:, 1:] &= ~(self.whole_word[ids[:, 1:]] & free[:, :-1])
        wanted = np.minimum(most, np.maximum(np.rint(count * self.rate), 1))
        order = permutation(np.where(begins, draw(_ORDER, here), np.uint64(2**64 - 1)))
        sizes = np.take_along_axis(_sizes(begins, free), order, axis=1).T.copy()
        fits, taken = np.zeros((T, B), bool), np.zeros(B, np.int32)
        for k in range(int(begins.sum(axis=1).max())):
            fits[k] = taken + sizes[k] <= wanted
            taken += sizes[k] * fits[k]
            if (taken == wanted).all():
                break
        chosen = np.zeros(ids.shape, bool)
        np.put_along_axis(chosen, order, fits.T, axis=1)
        word = np.maximum.accumulate(np.where(begins, here, np.int32(0)), axis=1)
        masked = np.take_along_axis(chosen, word, axis=1) & free
        return np.sort(np.where(masked, here, np.int32(T)), axis=1)[:, :most]


def bounds(count: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """Returns `first` and `last`, (B, seq_len), of sequences of count, (B, 1) int32, tokens and padding."""
    here = np.arange(seq_len, dtype=np.int32)
    first = np.where(here < count, np.int32(0), count)
    return {"first": first, "last": np.repeat(count - np.int32(1), seq_len, axis=1)}


def _sizes(begins: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Returns the tokens of the word that begins at a position, (B, T) int32; T where none begins."""
    B, T = begins.shape
    ends = np.full((B, T + 1), T, np.int32)
    ends[:, :-1] = np.where(begins | ~free, np.arange(T, dtype=np.int32), np.int32(T))
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # the next place where a word begins or cannot go on
    return np.where(begins, ends[:, 1:] - np.arange(T, dtype=np.int32), np.int32(T))
