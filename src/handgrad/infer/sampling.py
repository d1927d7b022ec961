"""Sampling: picks the next token from logits, and ends a stream of text at stop strings."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from handgrad.core.errors import HandgradError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises HandgradError for a value out of range."""

    temperature: float = 0.8
    """logits are divided by it; 0: always the most likely token"""
    top_k: int = 0
    """choose among this many most likely tokens; 0: all"""
    top_p: float = 1.0
    """choose among the fewest most likely tokens that hold this much probability; 1: all"""
    seed: int = 0
    """seed of the random choice"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise HandgradError("sample", "temperature must be 0 (greedy) or a positive number", self.temperature)
        if self.top_k < 0:
            raise HandgradError("sample", "top_k must be 0 (all tokens) or more", self.top_k)
        if not 0 < self.top_p <= 1:
            raise HandgradError("sample", "top_p must lie above 0 and at most at 1 (all tokens)", self.top_p)
        if self.seed < 0:
            raise HandgradError("sample", "seed must be 0 or more", self.seed)


class Sampler:
    """Picks the tokens of one sequence: the same settings and logits give the same tokens on every machine.

    drawable: (n,) bool, which ids may be picked; those from n on may not. None: all below vocab_size. A model may have
    more rows than its tokenizer has tokens. Raises HandgradError if no id is left.

    >>> sampler = Sampler(Sampling(temperature=0.0), vocab_size=3)
    >>> sampler.pick(np.array([0.1, 2.0, 0.3, 9.0], np.float32))  # the fourth column is padding
    1
    """

    def __init__(self, sampling: Sampling, vocab_size: int, drawable: np.ndarray | None = None):
        ids = np.arange(vocab_size) if drawable is None else np.flatnonzero(drawable[:vocab_size])
        if ids.size == 0:
            raise HandgradError("sample", "the model must have a row for a token of its tokenizer", "none")
        self.sampling = sampling
        self.vocab_size = int(ids[-1]) + 1
        self._gaps = np.setdiff1d(np.arange(self.vocab_size), ids)
        self._rng = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray) -> int:
        """Returns the id of the next token, below vocab_size. Ties go to the lowest id.

        logits: (Vp,) float32 with Vp >= vocab_size; columns of ids that are not drawable are never read

        Raises HandgradError if a logit is NaN or +inf, or all are -inf.
        """
        logits = logits[: self.vocab_size]
        if self._gaps.size:
            logits = logits.copy()
            logits[self._gaps] = -np.inf
        if self.sampling.temperature == 0:
            best = int(logits.argmax())  # a NaN wins
            _check_peak(logits[best])
            return best
        ids, p = candidates(logits, self.sampling)
        total = np.cumsum(p)
        # scaled by the total, so that rounding cannot pick a token after the last one that has probability
        return int(ids[np.searchsorted(total, self._rng.random() * total[-1], side="right")])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that may be picked: ids (n,) ascending, and probabilities (n,) float64 with sum 1.

    logits: (V,). First top-k, then the temperature, which must be above 0, then top-p of what is left.

    Raises HandgradError if a logit is NaN or +inf, or all are -inf.

    >>> ids, p = candidates(np.log([0.1, 0.4, 0.2, 0.3]), Sampling(temperature=1, top_k=3, top_p=0.7))
    >>> ids.tolist(), p.round(3).tolist()
    ([1, 3], [0.571, 0.429])
    """
    peak = logits.max()
    _check_peak(peak)
    ids = _largest(logits, sampling.top_k or logits.size)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the peak to -inf
        p = np.exp((logits[ids].astype(np.float64) - peak) / sampling.temperature)
    p /= p.sum()
    if sampling.top_p < 1:
        # tokens below this bound hold less than 1 - top_p together, so only the others are sorted
        likely = np.flatnonzero(p >= (1 - sampling.top_p) / p.size)
        ids, p = ids[likely], p[likely]
        nucleus = _largest(p, int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), sampling.top_p)) + 1)
        ids, p = ids[nucleus], p[nucleus] / p[nucleus].sum()
    return ids, p


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the `count` largest elements of `x`, ascending; ties go to the lowest position."""
    if count >= x.size:
        return np.arange(x.size)
    bound = np.partition(x, -count)[-count]
    keep = x > bound
    keep[np.flatnonzero(x == bound)[: count - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _check_peak(peak: float) -> None:
    if not np.isfinite(peak):
        hint = "the weights are damaged or the training run diverged"
        raise HandgradError("sample", "the largest logit must be a finite number", peak, hint=hint)


class StopStrings:
    """Ends a stream of text before the first stop string, however the text is split into pieces.

    `found` is the stop string, None until the stream has reached one.

    >>> stop = StopStrings(["\\n\\n", "END"])
    >>> [stop.feed(piece) for piece in ("to be ", "E", "gad E", "N", "D or")], stop.found
    (['to be ', '', 'Egad ', '', ''], 'END')
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise HandgradError("sample", "a stop string must hold at least one character", "an empty one")
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def feed(self, piece: str) -> str:
        """Returns the text that cannot be part of a stop string; nothing after one was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        start, self.found = first_stop(text, self.stops)
        if self.found is None:
            start -= _open_end(text, self.stops)
        self._held = text[start:] if self.found is None else ""
        return text[:start]

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yields the text of `pieces` up to the first stop string."""
        for piece in pieces:
            if text := self.feed(piece):
                yield text
            if self.found is not None:
                return
        if text := self.finish():
            yield text

    def finish(self) -> str:
        """Returns the text that was held back. Call it after the last piece."""
        held, self._held = self._held, ""
        return held


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Returns (start, stop string) of the one that ends first; of several that end there, the longest.

    (len(text), None) if the text holds none.
    """
    hits = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    _, start, stop = min(hits, default=(0, len(text), None))
    return start, stop


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the end of `text` could begin a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
