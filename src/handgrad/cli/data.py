"""handgrad data text FILE...: turns text into token shards that training maps into memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from handgrad import data, tokenizers
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError

USAGE = "handgrad data text FILE..."


@dataclass(frozen=True)
class Text:
    """Which files, which tokenizer, where to."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """UTF-8 text files, a document each"""
    out: str = "data"
    """folder for train_*.bin, val_*.bin and meta.json"""
    tokenizer: str = "gpt2"
    """gpt2, chars (one id a character), or the path of a tokenizer.json"""
    val_fraction: float = 0.1
    """part of the text, at its end, that becomes the validation set"""
    shard_tokens: int = 100_000_000
    """tokens in one shard"""


def main(argv: list[str]) -> int:
    """Runs the recipe that the first word names."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {USAGE} [flags]\n\nflags: handgrad data text --help")
        return 0
    if argv[:1] != ["text"]:
        raise HandgradError("data", "the recipe is 'text'", f"'{argv[0]}'" if argv else "nothing", hint=USAGE)
    a = parse(Text, argv[1:], "data text")
    files = [Path(f) for f in a.files]
    if not files:
        raise HandgradError("data", "text comes from at least one file", "none", hint=USAGE)
    if a.tokenizer == "gpt2":
        tokenizer = tokenizers.gpt2()
    elif a.tokenizer == "chars":
        tokenizer = tokenizers.chars(data.read_text(files))
    else:
        tokenizer = tokenizers.from_file(a.tokenizer)
    meta = data.prepare_text(files, a.out, tokenizer, a.val_fraction, a.shard_tokens)
    for split in ("train", "val"):
        print(f"{split:6} {meta[split]['tokens']:>13,} tokens in {len(meta[split]['shards'])} shards")
    print(f"vocabulary {meta['vocab_size']:,}; train on it: handgrad train --data.train {a.out}")
    return 0
