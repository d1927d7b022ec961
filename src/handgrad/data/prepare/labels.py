"""Labelled texts as shards: a record of one length for every text, so that any loader of windows finds them.

A record is the index of the label, the ids of the text or of two with an id of padding between them, and padding;
`data.Labels` reads it.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.limits import cpus
from handgrad.core.truncate import longest_first
from handgrad.data.json_lines import json_kind, json_object, repaired
from handgrad.data.meta import VALUE
from handgrad.data.prepare.build import Part, Progress, Settings, build
from handgrad.data.prepare.hub import local_part
from handgrad.data.prepare.readers import Parse, RowParser, rows_of, text_in
from handgrad.data.prepare.recipes import WORKER_BYTES, check_on_error, share_of_val
from handgrad.data.prepare.workers import Damage, Encoder

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

    def parser(self, parse: Parse, on_error: str) -> RowParser:
        """All of every row, for the reader of a file."""
        names = tuple(name for name in (self.text, self.label, self.pair) if name)
        flags = "--column, --label and --pair" if self.pair else "--column and --label"
        numbers = (self.label,) if self.are_numbers else ()
        return RowParser(parse, (names,), f"{flags} name other columns", numbers=numbers, on_error=on_error)


def prepare_labels(
    files: Sequence[Path],
    out_dir: str | Path,
    tokenizer: Encoder,
    pad_id: int,
    *,
    val: Sequence[Path] = (),
    val_fraction: float | None = None,
    columns: Columns = Columns(),
    seq_len: int = 128,
    on_error: str = "stop",
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    replace: bool = False,
    special_tokens: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Writes shards of labelled texts (see `build`); returns the content of meta.json, which names the labels.

    files: JSON lines, JSON lists, CSV or Parquet tables;  val: the same, for validation
    pad_id: the tokenizer's [PAD]
    val_fraction: without `val`, about this share of the texts, by their hash: a text that occurs twice is in one part,
        and so are pairs with the same first text; None: 0.1
    seq_len: tokens of a sequence, [CLS] and [SEP] counted; longer texts are cut
    on_error: "stop" at a row without text or label, or "skip" and count such rows
    special_tokens: a special token spelled out in a text is that token; else it is plain text

    Raises HandgradError for a row without text or label, fewer than two labels, and as `build` does.
    """
    least = LEAST + 2 * bool(columns.pair)
    if seq_len < least:
        raise HandgradError("data", f"seq_len must be at least {least} tokens", seq_len)
    share = share_of_val(val, val_fraction, 0.1)
    check_on_error(on_error, ("stop", "skip"))
    labels, skipped = _labels([*files, *val], columns, on_error, most=min(tokenizer.vocab_size, MOST_LABELS))
    record, index = seq_len - 1, {label: number for number, label in enumerate(labels)}

    def parts(paths: Sequence[Path], split: str, low: float, high: float) -> list[Part]:
        document = partial(_document, columns=columns, index=index, share=(low, high))
        jobs = partial(rows_of, parser=columns.parser(document, on_error))
        return [local_part(path, jobs, split) for path in paths]

    found = parts(files, "train", share, 1.0) + parts(val or files, "val", 0.0, 1.0 if val else share)
    size = sum(part.size for part in found)
    settings = Settings(
        shard_tokens=max(shard_tokens // record, 1) * record,
        wants_val=bool(val) or share > 0,
        workers=workers or min(cpus(), 1 + size // WORKER_BYTES),
        replace=replace,
        # both parts of a file without `val` pass its bad rows, which are counted once
        about=_about(labels, record, columns) | ({"skipped": skipped} if skipped else {}),
        special=special_tokens,
        on_error=on_error,
        source=(columns.text, columns.label, columns.pair, share),
    )
    records = Records(tokenizer, pad_id, record, bool(columns.pair))
    return build("labels", found, out_dir, records, settings, progress)


@dataclass(frozen=True)
class Records:
    """An `Encoder` of documents "INDEX TEXT", where INDEX is that of the label: each becomes a record.

    pairs: documents are "INDEX LENGTH TEXTS", where LENGTH is that of the first of two texts once its surrogates are
        paired or replaced, and a line break divides them: lone surrogates at their ends would pair up
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
            first, second = (self._ids(part, special) for part in (said[: int(length)], said[int(length) + 1 :]))
            a, b = longest_first(len(first), len(second), self.record - 2)
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


def _labels(paths: Sequence[Path], columns: Columns, on_error: str, most: int) -> tuple[list[str], int]:
    """Returns (all labels, numbers by size, texts by the alphabet; rows that are skipped).

    Raises HandgradError for fewer than two labels, or more than `most`.
    """
    parser, labels, skipped = columns.parser(partial(_row, columns=columns), on_error), set(), 0
    for path in paths:
        for _, job in rows_of(path, parser):
            for found in job.read(*job.arguments):
                if isinstance(found, Damage):
                    skipped += found.skipped
                else:
                    labels.add(found[0])
    if len(labels) < 2:
        left = f": {skipped:,} rows are left out" if skipped else ""
        rule = f"the texts must have two labels or more under {columns.label!r}"
        raise HandgradError("data", rule, f"{len(labels)}{left}")
    if len(labels) > most:
        hint = "numbers with fewer digits" if columns.are_numbers else ""
        raise HandgradError("data", f"there must be at most {most:,} labels", f"{len(labels):,}", hint=hint)
    if columns.are_numbers:
        return sorted(labels, key=float), skipped
    return sorted(labels, key=int if all(label.isdecimal() for label in labels) else None), skipped


def _row(row: object, where: str, columns: Columns) -> tuple[str, str, str]:
    """Returns (label, text, second text of a pair) of a row. Raises HandgradError if it lacks one."""
    found = json_object(row, where)
    text = text_in(found, where, columns.text)
    second = text_in(found, where, columns.pair) if columns.pair else ""
    return _label(found, columns, where), text, second


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
    return repaired(str(value))[0]


def _document(
    row: object, where: str, columns: Columns, index: Mapping[str, int], share: tuple[float, float]
) -> str | None:
    """Returns "INDEX TEXT", or "INDEX LENGTH TEXT SECOND", of a row, if its text has a hash in this share."""
    label, text, second = _row(row, where, columns)
    low, high = share
    if not low <= zlib.crc32(json.dumps(text).encode()) / 2**32 < high:
        return None
    if not columns.pair:
        return f"{index[label]} {text}"
    return f"{index[label]} {len(repaired(text)[0])} {text}\n{second}"
