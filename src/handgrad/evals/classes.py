"""class_metrics: how well a classifier tells labelled texts."""

from collections.abc import Callable, Iterator

import numpy as np

from handgrad.data import Tokens
from handgrad.evals.metrics import Metric, mean
from handgrad.infer.texts import TextEncoder

AT_ONCE = 4096  # texts that are sorted by length together


def class_metrics(
    data: Tokens, encoder: TextEncoder, limit: int | None = None, done: Callable[[int], None] = lambda texts: None
) -> dict[str, Metric]:
    """acc: the share of texts whose likeliest label is right;  loss: nats of the right label, a mean. Each with its
    standard error over texts.

    limit: the first `limit` texts, None for all;  done: called now and then with the number of texts so far
    """
    hits: list[bool] = []
    losses: list[float] = []
    for part in _parts(data, limit):
        for (_, label), found in zip(part, encoder.classify_ids([ids for ids, _ in part])):
            z = found.logits.astype(np.float64)
            losses.append(float(np.logaddexp.reduce(z) - z[label]))
            hits.append(encoder.labels[label] == found.label)
        done(len(hits))
    return {"acc": mean(hits), "loss": mean(losses)}


def _parts(data: Tokens, limit: int | None) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Yields (ids of a text without padding, its label), some thousand at a time."""
    part: list[tuple[np.ndarray, int]] = []
    for b in data.sweep(1, limit and limit * data.seq_len, names=("ids", "last", "targets")):
        part.append((b["ids"][0, : b["last"][0, 0] + 1], int(b["targets"][0])))
        if len(part) == AT_ONCE:
            yield part
            part = []
    if part:
        yield part
