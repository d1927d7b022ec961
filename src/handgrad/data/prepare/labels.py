"""Labelled texts as shards: a record of one length for every text, so that any loader of windows finds them.

A record is the index of the label, the ids of the text or of two with an id of padding between them, and padding;
`data.Labels` reads it.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.limits import cpus
from handgrad.core.truncate import cut_longest
from handgrad.data.json_lines import json_kind, json_row, json_rows
from handgrad.data.meta import VALUE
from handgrad.data.prepare.bounds import blocks
from handgrad.data.prepare.build import Part, Progress, Settings, build
from handgrad.data.prepare.hub import local_part
from handgrad.data.prepare.readers import text_in
from handgrad.data.prepare.recipes import WORKER_BYTES
from handgrad.data.prepare.workers import Encoder, Job

MOST_LABELS = 2**16
MOST_NUMBER = 1e9  # whose square is far from float32's end
LEAST = 3  # tokens of a sequence: [CLS], one of the text, [SEP]; 2 more for another text


@dataclass(frozen=True)
class Columns:
    """Where a row has its text and its label; pair: a second text, empty if there is none.

    are_numbers: labels are numbers, which a model learns to predict
    """

    text: str = "text"
    label: str = "label"
    pair: str = ""
    are_numbers: bool = False


def prepare_labels(
    files: Sequence[Path],
    out_dir: str | Path,
    tokenizer: Encoder,
    pad_id: int,
    *,
    val: Sequence[Path] = (),
    val_fraction: float = 0.1,
    columns: Columns = Columns(),
    seq_len: int = 128,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    replace: bool = False,
    special_tokens: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Writes shards of labelled texts (see `build`); returns the content of meta.json, which names the labels.

    files: JSON lines, also .gz, .xz, .bz2;  val: the same, for validation
    pad_id: the tokenizer's [PAD]
    val_fraction: without `val`, about this share of the texts, by their hash: a text that occurs twice is in one part.
        So are pairs with the same first text
    seq_len: tokens of a sequence, [CLS] and [SEP] counted; longer texts are cut
    special_tokens: a special token spelled out in a text is that token; else it is plain text

    Raises HandgradError for a row without text or label, fewer than two labels, and as `build` does.
    """
    least = LEAST + 2 * bool(columns.pair)
    if seq_len < least:
        raise HandgradError("data", f"seq_len must be at least {least} tokens", seq_len)
    if not 0 <= val_fraction < 1:
        raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
    labels = _labels([*files, *val], columns)
    if len(labels) > min(tokenizer.vocab_size, MOST_LABELS):
        rule = f"there must be at most {min(tokenizer.vocab_size, MOST_LABELS):,} labels"
        hint = "numbers with fewer digits" if columns.are_numbers else ""
        raise HandgradError("data", rule, f"{len(labels):,}", hint=hint)
    record = seq_len - 1

    def parts(paths: Sequence[Path], split: str, low: float, high: float) -> list[Part]:
        jobs = partial(_jobs, columns=columns, labels=labels, share=(low, high))
        return [local_part(path, jobs, split) for path in paths]

    cut = 0.0 if val else val_fraction
    found = parts(files, "train", cut, 1.0) + parts(val or files, "val", 0.0, 1.0 if val else cut)
    size = sum(part.size for part in found)
    settings = Settings(
        shard_tokens=max(shard_tokens // record, 1) * record,
        wants_val=bool(val) or val_fraction > 0,
        workers=workers or min(cpus(), 1 + size // WORKER_BYTES),
        replace=replace,
        about=_about(labels, record, columns),
        special=special_tokens,
    )
    records = Records(tokenizer, pad_id, record, bool(columns.pair))
    return build("labels", found, out_dir, records, settings, progress)


@dataclass(frozen=True)
class Records:
    """An `Encoder` of documents "INDEX TEXT", where INDEX is that of the label: each becomes a record.

    pairs: documents are "INDEX LENGTH TEXTS", where LENGTH is that of the first of two texts
    """

    inner: Encoder
    pad_id: int
    record: int
    pairs: bool = False
    eot: None = None

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def begins(self) -> tuple[int, ...]:
        return ()  # the objective puts [CLS] before a text

    @property
    def specials(self) -> tuple[str, ...]:
        return self.inner.specials

    def bytes_of(self, id: int) -> bytes:
        return self.inner.bytes_of(id)

    def save(self, folder: Path) -> dict:
        return self.inner.save(folder)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        label, _, said = text.partition(" ")
        found = np.full(self.record, self.pad_id, np.int32)
        found[0] = int(label)
        if self.pairs:
            length, _, said = said.partition(" ")
            first, second = (self._ids(part, special) for part in (said[: int(length)], said[int(length) :]))
            a, b = cut_longest(len(first), len(second), self.record - 2)
            found[1 : 1 + a], found[2 + a : 2 + a + b] = first[:a], second[:b]
        else:
            ids = self._ids(said, special)[: self.record - 1]
            found[1 : 1 + len(ids)] = ids
        return found

    def _ids(self, text: str, special: bool) -> np.ndarray:
        ids = self.inner.encode(text, special)
        return ids[ids != self.pad_id]


def _about(labels: Sequence[str], record: int, columns: Columns) -> dict:
    """Returns what meta.json says of the texts, which `data.labelled` reads."""
    values = {"values": [float(label) for label in labels]} if columns.are_numbers else {}
    pairs = {"pairs": True} if columns.pair else {}
    return {"labels": [VALUE] if columns.are_numbers else list(labels), "record": record} | pairs | values


def _labels(paths: Sequence[Path], columns: Columns) -> list[str]:
    """Returns all labels, numbers by size, texts by the alphabet."""
    column = columns.label
    found = {_label(row, columns, where) for path in paths for where, row in json_rows(path)}
    if len(found) < 2:
        raise HandgradError("data", f"the texts must have two labels or more under {column!r}", f"{len(found)}")
    if columns.are_numbers:
        return sorted(found, key=float)
    if all(label.isdecimal() for label in found):
        return sorted(found, key=int)
    return sorted(found)


def _label(row: dict, columns: Columns, where: str) -> str:
    column = columns.label
    value = row.get(column)
    if columns.are_numbers:
        if type(value) is bool or not isinstance(value, int | float) or not abs(value) <= MOST_NUMBER:
            rule = f"{where}: an object must hold a number of at most {MOST_NUMBER:.0e} under {column!r}"
            raise HandgradError("data", rule, repr(value) if column in row else "none")
        return repr(float(value))
    if type(value) is bool or not isinstance(value, str | int):
        rule = f"{where}: an object must hold a label, text or a whole number, under {column!r}"
        hint = "" if column in row else "--label names another column"
        hint = "--regression learns numbers" if type(value) is float else hint
        raise HandgradError("data", rule, json_kind(value) if column in row else "none", hint=hint)
    return str(value)


def _jobs(path: Path, columns: Columns, labels: Sequence[str], share: tuple[float, float]) -> Iterator[tuple[int, Job]]:
    for read, at, lines in blocks(path):
        yield read, Job(_documents, (path, lines, at, columns, labels, share))


def _documents(
    path: Path, lines: Sequence[bytes], at: int, columns: Columns, labels: Sequence[str], share: tuple[float, float]
) -> Iterator[str]:
    """Yields "INDEX TEXT" of the rows whose text has a hash in this share."""
    index, (low, high) = {label: i for i, label in enumerate(labels)}, share
    for line in lines:
        if line.strip():
            where = f"{path}, line at byte {at}"
            row = json_row(line, where)
            text = text_in(row, columns.text, where)
            assert isinstance(row, dict)
            if low <= zlib.crc32(json.dumps(text).encode()) / 2**32 < high:
                if columns.pair:
                    text = f"{len(text)} {text}{text_in(row, columns.pair, where)}"
                yield f"{index[_label(row, columns, where)]} {text}"
        at += len(line)
