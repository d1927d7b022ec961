"""class_metrics: how well a classifier tells labelled texts, or a regression predicts numbers."""

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
    standard error over texts.  macro_f1: the mean F1 of the labels that occur or are predicted, without one.

    Of a regression, see `value_metrics`.

    limit: the first `limit` texts, None for all;  done: called now and then with the number of texts so far
    """
    logits: list[np.ndarray] = []
    targets: list[float] = []
    for part in _parts(data, limit):
        logits.extend(encoder.logits_of([read for read, _ in part]).astype(np.float64))
        targets.extend(target for _, target in part)
        done(len(targets))
    if encoder.model.is_regression:
        return value_metrics(np.array(logits)[:, 0], np.array(targets))
    predicted, labels = [int(z.argmax()) for z in logits], [int(target) for target in targets]
    losses = [float(np.logaddexp.reduce(z) - z[label]) for z, label in zip(logits, labels)]
    hits = [a == b for a, b in zip(predicted, labels)]
    return {"acc": mean(hits), "loss": mean(losses), "macro_f1": (macro_f1(predicted, labels), math.nan)}


def value_metrics(predicted: np.ndarray, values: np.ndarray) -> dict[str, Metric]:
    """Of a regression, loss: the mean squared error;  pearson, spearman: correlations of numbers and of their ranks,
    NaN where all are equal."""
    found = {"loss": mean(((predicted - values) ** 2).tolist())}
    pairs = {"pearson": (predicted, values), "spearman": (ranks(predicted), ranks(values))}
    for name, (a, b) in pairs.items():
        spread = float(a.std() * b.std())
        found[name] = (float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else math.nan), math.nan
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in ascending order, from 0; equal ones share the mean of theirs.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def macro_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """The mean over labels of F1, the harmonic mean of precision and recall.

    >>> macro_f1([0, 0, 1], [0, 1, 1])  # both labels have 2/3
    0.6666666666666666
    """
    hits = Counter(a for a, b in zip(predicted, labels) if a == b)
    occur = Counter(predicted) + Counter(labels)
    return sum(2 * hits[label] / count for label, count in occur.items()) / len(occur)


def _parts(data: Tokens, limit: int | None) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Yields (ids and types of a text without padding, its label, or number), some thousand at a time."""
    part: list[tuple[np.ndarray, float]] = []
    for b in data.sweep(1, limit and limit * data.seq_len, names=data.objective.inputs):
        read = np.concatenate([b["ids"], b["types"]])[:, : b["last"][0, 0] + 1]
        part.append((read, float(b["values" if "values" in b else "targets"][0])))
        if len(part) == AT_ONCE:
            yield part
            part = []
    if part:
        yield part
