"""class_metrics: how well a classifier tells labelled texts."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from handgrad.data import Tokens
from handgrad.evals.metrics import Metric, mean
from handgrad.infer.texts import TextEncoder

AT_ONCE = 4096  # texts that are sorted by length together


def class_metrics(
    data: Tokens, encoder: TextEncoder, limit: int | None = None, done: Callable[[int], None] = lambda texts: None
) -> dict[str, Metric]:
    """acc: the share of texts whose likeliest label is right;  loss: nats of the right label, a mean; both with their
    standard error over texts.  macro_f1: the mean F1 of the labels that occur or were given, without one.

    limit: the first `limit` texts, None for all;  done: called now and then with the number of texts so far
    """
    given: list[int] = []
    right: list[int] = []
    losses: list[float] = []
    for part in _parts(data, limit):
        for (_, label), found in zip(part, encoder.classify_ids([read for read, _ in part])):
            z = found.logits.astype(np.float64)
            losses.append(float(np.logaddexp.reduce(z) - z[label]))
            given.append(int(z.argmax()))
            right.append(label)
        done(len(right))
    hits = [a == b for a, b in zip(given, right)]
    return {"acc": mean(hits), "loss": mean(losses), "macro_f1": (macro_f1(given, right), math.nan)}


def macro_f1(given: Sequence[int], right: Sequence[int]) -> float:
    """The mean over labels of F1, the harmonic mean of precision and recall.

    >>> macro_f1([0, 0, 1], [0, 1, 1])  # both labels have 2/3
    0.6666666666666666
    """
    hits = Counter(a for a, b in zip(given, right) if a == b)
    occur = Counter(given) + Counter(right)
    return sum(2 * hits[label] / count for label, count in occur.items()) / len(occur)


def _parts(data: Tokens, limit: int | None) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Yields (ids and types of a text without padding, its label), some thousand at a time."""
    part: list[tuple[np.ndarray, int]] = []
    for b in data.sweep(1, limit and limit * data.seq_len, names=("ids", "types", "last", "targets")):
        read = np.concatenate([b["ids"], b["types"]])[:, : b["last"][0, 0] + 1]
        part.append((read, int(b["targets"][0])))
        if len(part) == AT_ONCE:
            yield part
            part = []
    if part:
        yield part
