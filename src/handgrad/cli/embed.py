"""handgrad embed MODEL FILE: an embedding of every line of a file, as JSON lines or as a .npy file."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from handgrad.cli.compute import Compute
from handgrad.cli.flags import parse
from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.infer.texts import TextEncoder, load_encoder, write_array

T = TypeVar("T")
AT_ONCE = 4096  # texts that are sorted by length together; results follow after each of these


@dataclass(frozen=True)
class Reading:
    """A BERT, and texts, a line each."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, one of its checkpoints, a Hugging Face folder, or hf:NAME"""
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """UTF-8, a text a line; -: standard input"""
    context: int = 0
    """tokens of a text that are read, [CLS] and [SEP] counted; 0: as many as the model reads"""
    special_tokens: bool = False
    """a special token spelled out in a text, such as [SEP], is that token; else it is plain text"""
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True)
class Embed(Reading):
    """Model, texts and pooling."""

    out: str = ""
    """FILE.npy: an array (texts, hidden size) of float32; empty: JSON lines on standard output"""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """mean of the tokens' rows, or the row of [CLS]; auto: as sentence-transformers' files say, else mean"""
    normalize: bool = True
    """give embeddings length 1, so that a dot product is a cosine"""


def main(argv: list[str]) -> int:
    """Embeds the lines of the file."""
    a = parse(Embed, argv, "embed")
    out = Path(a.out)
    if a.out and (out.suffix != ".npy" or not out.absolute().parent.is_dir()):
        raise HandgradError("embed", "--out is FILE.npy in a folder that exists", f"'{a.out}'")
    texts = read_lines(a.file, "embed")
    encoder = open_encoder(a, "embed")
    found = []
    for part in parts(texts):
        found.append(encoder.embed(part, a.pooling, a.normalize))
        for text, row in zip(part, found.pop() if not a.out else ()):
            print(json.dumps({"text": text, "embedding": row.tolist()}, ensure_ascii=False))
    if a.out:
        count, size = write_array(out, found)
        print(f"{out}: {count:,} embeddings of {size} numbers, float32")
    report_cut(encoder, texts)
    return 0


def open_encoder(a: Reading, verb: str) -> TextEncoder:
    """The model of a command line."""
    context, special = whole(verb, "--context", a.context, 0), a.special_tokens
    return load_encoder(a.run, *a.compute.settings, context, special_tokens=special)


def read_lines(file: str, verb: str) -> list[str]:
    """The lines of a file or of standard input, without their ends; an empty line is an empty text."""
    if file != "-":
        require_file(Path(file), f"'{file}'", verb)
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise HandgradError(verb, "texts are UTF-8", found) from None
    except OSError as error:
        raise HandgradError(verb, f"'{file}' can be read", error.strerror) from None
    texts = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if not texts:
        raise HandgradError(verb, "a file holds texts, a line each", "an empty one")
    return texts


def parts(texts: Sequence[T]) -> Iterator[Sequence[T]]:
    """The texts in order, some thousand at a time."""
    return (texts[at : at + AT_ONCE] for at in range(0, len(texts), AT_ONCE))


def report_cut(encoder: TextEncoder, texts: Sequence[object]) -> None:
    """Says how many texts were cut, if any was."""
    if encoder.num_cut:
        what = f"{encoder.num_cut:,} of {len(texts):,} texts have more than {encoder.context} tokens"
        print(f"[handgrad] {what}: their ends were cut off", file=sys.stderr)
