"""handgrad classify MODEL FILE: the class of every line of a file, as JSON lines."""

import json
from dataclasses import dataclass

from handgrad.cli.embed import Reading, open_encoder, parts, read_lines, report_cut
from handgrad.cli.flags import parse


@dataclass(frozen=True)
class Classify(Reading):
    """Model and texts."""


def main(argv: list[str]) -> int:
    """Classifies the lines of the file."""
    a = parse(Classify, argv, "classify")
    texts = read_lines(a.file, "classify")
    encoder = open_encoder(a, "classify")
    for part in parts(texts):
        for text, found in zip(part, encoder.classify(part)):
            said = {"text": text, "label": found.label, "probability": round(found.probability, 6)}
            print(json.dumps(said, ensure_ascii=False))
    report_cut(encoder, texts)
    return 0
