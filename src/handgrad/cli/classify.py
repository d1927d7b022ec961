"""handgrad classify MODEL FILE: the class of every line of a file, or a regression's number, as JSON lines."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from handgrad.cli.embed import Reading, open_encoder, parts, read_lines, report_cut
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.infer.texts import Text, TextEncoder


@dataclass(frozen=True)
class Classify(Reading):
    """Model and texts."""

    pair: bool = False
    """every line holds two texts, with a tab between them, for a model that has learnt labels of pairs"""


def main(argv: list[str]) -> int:
    """Classifies the lines of the file."""
    a = parse(Classify, argv, "classify")
    lines = read_lines(a.file, "classify")
    texts: list[Text] = [*split_pairs(lines)] if a.pair else [*lines]
    encoder = open_encoder(a, "classify")
    for part in parts(texts):
        for text, found in zip(part, results(encoder, part)):
            said: dict[str, Any] = {"text": text} if isinstance(text, str) else dict(zip(("text", "pair"), text))
            print(json.dumps(said | found, ensure_ascii=False))
    report_cut(encoder, texts)
    return 0


def results(encoder: TextEncoder, texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
    """What is said of each text: its class with the probability, or the number that a regression predicts."""
    if encoder.model.is_regression:
        yield from ({encoder.labels[0]: round(value, 6)} for value in encoder.logits(texts)[:, 0].tolist())
    else:
        for found in encoder.classify(texts):
            yield {"label": found.label, "probability": round(found.probability, 6)}


def split_pairs(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The two texts of every line. Raises HandgradError for a line that does not hold two."""
    for number, line in enumerate(lines, 1):
        first, *others = line.split("\t")
        if len(others) != 1:
            rule = f"line {number} holds two texts with a tab between them"
            raise HandgradError("classify", rule, f"{len(others)} tabs", hint="without --pair a line is a text")
        yield first, others[0]
