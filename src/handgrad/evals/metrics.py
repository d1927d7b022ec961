"""Metrics from the losses of continuations, each as (value, standard error)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data import Tokens
from handgrad.evals.scoring import Score, Scorer
from handgrad.evals.tasks import TASKS, Item
from handgrad.tokenizers import Tokenizer

Metric = tuple[float, float]


def evaluate(
    name: str, items: Sequence[Item], scorer: Scorer, done: Callable[[int], None] = lambda pairs: None
) -> dict[str, Metric]:
    """The metrics of a task. done: called now and then with the number of pairs scored so far."""
    wanted = TASKS[name].metrics
    words = "perplexity" in wanted
    scores = scorer.score([pair for item in items for pair in item.pairs], greedy=words, done=done)
    found = word_metrics(scores) if words else choice_metrics(items, scores)
    return {metric: found[metric] for metric in wanted}


def choices(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, np.ndarray]:
    """The answers that each rule chooses, (questions,) int; ties go to the first.

    acc: least sum of losses;  acc_norm: least sum divided by the characters of the answer (both: lm-evaluation-harness)
    acc_llmc: least mean loss per token (llm.c)
    """
    rows: dict[str, list[int]] = {"acc": [], "acc_norm": [], "acc_llmc": []}
    rest = iter(scores)
    for item in items:
        losses = [next(rest).losses for _ in item.pairs]
        sums = np.array([nats.sum(dtype=np.float64) for nats in losses])
        rows["acc"].append(int(sums.argmin()))
        rows["acc_norm"].append(int((sums / item.characters).argmin()))
        rows["acc_llmc"].append(int((sums / [len(nats) for nats in losses]).argmin()))
    return {rule: np.array(chosen) for rule, chosen in rows.items()}


def choice_metrics(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, Metric]:
    """The share of right answers by each rule."""
    labels = np.array([item.label for item in items])
    return {rule: mean(chosen == labels) for rule, chosen in choices(items, scores).items()}


def word_metrics(scores: Sequence[Score]) -> dict[str, Metric]:
    """acc: the share of words that greedy decoding writes;  perplexity: per word, however many tokens it has."""
    loss, error = mean([score.losses.sum(dtype=np.float64) for score in scores])
    return {"acc": mean([bool(score.greedy) for score in scores]), "perplexity": _perplexity(loss, error)}


def val_metrics(
    data: Tokens,
    tokenizer: Tokenizer,
    scorer: Scorer,
    limit: int | None = None,
    done: Callable[[int], None] = lambda pairs: None,
) -> dict[str, Metric]:
    """Loss in nats per token, perplexity, and bits per byte of text, over the first `limit` tokens of `data`.

    The tokens are those that training counts: of chat data the assistant's. The token that ends a document counts as a
    token, not as text. Standard errors are over sequences, or over documents where the data keep them apart.
    """
    parts = [part for batch in data.sweep(1, limit) for part in _documents(batch)]
    scores = scorer.score([pair for pair, _ in parts], done=done)
    counts = np.array([own.sum() for _, own in parts])
    sums = np.array([score.losses[own].sum(dtype=np.float64) for score, (_, own) in zip(scores, parts)])
    loss, error = ratio(sums, counts)
    said = (id for (_, targets), own in parts for id in targets[own].tolist() if id != tokenizer.eot)
    nbytes = sum(len(text.encode("utf-8", "replace")) for text in tokenizer.stream(said))
    bits = int(counts.sum()) / max(nbytes, 1) / math.log(2)
    return {"loss": (loss, error), "perplexity": _perplexity(loss, error), "bits_per_byte": (loss * bits, error * bits)}


def _documents(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Yields (the first id and those after it, which of these count) of each text that a sequence keeps apart."""
    ids, targets = batch["ids"][0], batch["targets"][0]
    begins = np.flatnonzero(batch["positions"][0] == 0) if "positions" in batch else np.zeros(1, np.int64)
    for begin, end in zip(begins, [*begins[1:], ids.size]):
        own = np.flatnonzero(targets[begin:end] != IGNORE_INDEX)
        if own.size:  # the last target is no input; what follows the last that counts has no effect
            after = np.append(ids[begin + 1 : end], targets[end - 1])[: own[-1] + 1]
            yield (ids[begin : begin + 1], after), np.isin(np.arange(after.size), own)


def mean(values: Sequence[float]) -> Metric:
    """(mean, its standard error from the sample's standard deviation); NaN for one value.

    >>> mean([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    sample = np.asarray(values, np.float64)
    spread = sample.std(ddof=1) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan
    return float(sample.mean()), float(spread)


def ratio(sums: np.ndarray, counts: np.ndarray) -> Metric:
    """(all sums over all counts, its standard error to first order), of parts that have a sum and a count each."""
    value = float(sums.sum() / counts.sum())
    return value, mean((sums - value * counts) / counts.mean())[1]


def _perplexity(loss: float, error: float) -> Metric:
    """The exponential of a mean loss, and its error to first order."""
    value = math.exp(loss) if loss < 700 else math.inf
    return value, value * error
