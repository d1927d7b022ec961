"""Spans: T5's span corruption. The encoder reads a text with gaps, the decoder predicts what fills them."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.draws import Draws, permutation

_KEPT, _NOISE = 1, 2  # streams of draws


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Spans of tokens are cut out; a sentinel stands for each, and the targets are the sentinels with their spans.

    source: (B, source_len), the encoder's input: kept tokens and sentinels, eos_id at the end
    targets: (B, seq_len), each sentinel with its span, eos_id at the end; no sentinel closes the last span
    ids: (B, seq_len), the decoder's input: pad_id, then the targets but the last

    first_sentinel: the sentinel of the first span; those of later spans descend by 1
    sentinels: how many there are; the ids of the shards must lie below all of them
    source_len, rate, mean: length of the source, share of tokens cut out, mean length of a span
    eos_id, pad_id: the end of a text, and what the decoder starts with

    Counts are the same in every sequence, so there is no padding: `raw_len` ids become source_len tokens of source and
    `seq_len` targets. A sequence begins with kept tokens and ends with a span. Lengths are random: all ways to cut the
    kept tokens into so many pieces are equally likely, and so are those of the tokens in spans.

    Raises HandgradError if these settings cannot fill a sequence.

    >>> objective = Spans(source_len=512, first_sentinel=32099, eos_id=1, pad_id=0)
    >>> objective.raw_len, objective.seq_len
    (568, 114)
    >>> small = Spans(source_len=9, rate=0.3, mean=2, first_sentinel=99, eos_id=1, pad_id=0, sentinels=2)
    >>> arrays = small.fill(np.arange(10, 10 + small.raw_len)[None].astype(np.int32), None, Draws(0, [0]), ())
    >>> arrays["source"].tolist(), arrays["targets"].tolist(), arrays["ids"].tolist()
    ([[10, 99, 12, 13, 14, 15, 16, 98, 1]], [[99, 11, 98, 17, 18, 1]], [[0, 99, 11, 98, 17, 18]])
    """

    first_sentinel: int
    eos_id: int
    pad_id: int
    source_len: int = 512
    rate: float = 0.15
    mean: float = 3.0
    sentinels: int = 100
    static: ClassVar[bool] = False
    partners: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("source", "ids", "targets")

    def __post_init__(self) -> None:
        if not (0 < self.rate < 1 and self.mean >= 1 and self.source_len >= 3):
            rule = "Spans has a rate in 0..1, ends excluded, a mean of at least 1 and a source_len of at least 3"
            raise HandgradError("data", rule, f"{self.rate}, {self.mean} and {self.source_len}")
        raw, noise, spans = span_counts(self.source_len, self.rate, self.mean)
        if spans > raw - noise:
            raise HandgradError("data", f"Spans keeps a token before each of {spans} spans", f"{raw - noise} tokens")
        if spans > self.sentinels:
            hint = "a shorter source_len, or a larger mean"
            raise HandgradError("data", f"Spans has a sentinel for each of {spans} spans", self.sentinels, hint=hint)
        if not 0 < self.vocab_size <= 2**31 - self.sentinels:
            rule = f"Spans has a first_sentinel of {self.sentinels}.., as {self.sentinels} sentinels descend from it"
            raise HandgradError("data", rule, self.first_sentinel)

    @property
    def raw_len(self) -> int:
        """Raw ids in a sequence."""
        return span_counts(self.source_len, self.rate, self.mean)[0]

    @property
    def seq_len(self) -> int:
        """Targets in a sequence: tokens in spans, a sentinel for each, and eos_id."""
        _, noise, spans = span_counts(self.source_len, self.rate, self.mean)
        return noise + spans + 1

    @property
    def largest_id(self) -> int:
        return max(self.first_sentinel, self.eos_id, self.pad_id)

    @property
    def vocab_size(self) -> int:
        return self.first_sentinel + 1 - self.sentinels

    def window(self, seq_len: int) -> tuple[int, int]:
        if seq_len != self.seq_len:
            rule = f"sources of {self.source_len} tokens have targets of seq_len {self.seq_len}"
            hint = "leave seq_len out: it follows from the model's max_seq_len, the length of sources"
            raise HandgradError("data", rule, seq_len, hint=hint)
        return self.raw_len, self.raw_len

    def tokens(self, seq_len: int) -> int:
        return self.source_len + seq_len

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        B = len(raw)
        length, noise, spans = span_counts(self.source_len, self.rate, self.mean)
        kept = _pieces(draw, _KEPT, length - noise, spans)
        cut = _pieces(draw, _NOISE, noise, spans)
        lengths = np.stack([kept, cut], axis=2).ravel()  # of kept and cut pieces in turn, sequence after sequence
        piece = np.repeat(np.arange(len(lengths), dtype=np.int32) % (2 * spans), lengths).reshape(B, length)
        in_span, begins = piece % 2 == 1, np.ones((B, length), bool)
        begins[:, 1:] = piece[:, 1:] != piece[:, :-1]
        sentinel = np.int32(self.first_sentinel) - piece // 2
        source = np.full((B, self.source_len), self.eos_id, np.int32)
        source[:, :-1] = np.where(in_span, sentinel, raw)[~in_span | begins].reshape(B, -1)
        targets = np.full((B, self.seq_len), self.eos_id, np.int32)
        targets[:, :-1] = np.where(in_span, raw, sentinel)[in_span | begins].reshape(B, -1)
        ids = np.full_like(targets, self.pad_id)
        ids[:, 1:] = targets[:, :-1]
        return {"source": source, "ids": ids, "targets": targets}


@cache
def span_counts(source_len: int, rate: float, mean: float) -> tuple[int, int, int]:
    """Returns (raw ids, ids in spans, spans) of the longest sequence whose source has at most `source_len` tokens.

    Of n raw ids, round(n * rate) are in spans, and there are round(that / mean) spans, of both at least one. The source
    has the others, a sentinel for each span, and eos_id. One more raw id adds one token to it, or none, so the longest
    has exactly source_len.
    """

    def counts(raw: int) -> tuple[int, int, int]:
        noise = min(max(round(raw * rate), 1), raw - 1)
        return raw, noise, max(round(noise / mean), 1)

    raw = 2
    while True:
        following, noise, spans = counts(raw + 1)
        if following - noise + spans + 1 > source_len:
            return counts(raw)
        raw = following


def _pieces(draw: Draws, stream: int, items: int, pieces: int) -> np.ndarray:
    """Returns the lengths of `pieces` random pieces of `items`, (rows, pieces): all ways to cut are equally likely."""
    cuts = np.sort(permutation(draw(stream, np.arange(items - 1)))[:, : pieces - 1], axis=1)
    return np.diff(cuts + 1, axis=1, prepend=0, append=items)
