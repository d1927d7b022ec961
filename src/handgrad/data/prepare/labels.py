"""Labelled texts as shards: a record of one length for every text, so that any loader of windows finds them.

A record is the index of the label, the ids of the text, and padding; `data.Labels` reads it.
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
from handgrad.data.json_lines import json_kind, json_object, repaired
from handgrad.data.prepare.build import Part, Progress, Settings, build
from handgrad.data.prepare.hub import local_part
from handgrad.data.prepare.readers import Take, Wanted, rows_of, text_in
from handgrad.data.prepare.recipes import WORKER_BYTES, check_on_error, share_of_val
from handgrad.data.prepare.workers import Damage, Encoder

MOST_LABELS = 2**16
LEAST = 3  # tokens of a sequence: [CLS], one of the text, [SEP]


@dataclass(frozen=True)
class Columns:
    """Where a row has its text and its label."""

    text: str = "text"
    label: str = "label"

    def wanted(self, take: Take, on_error: str) -> Wanted:
        """Both of every row, for the reader of a file."""
        hint = "--column and --label name other columns"
        return Wanted(take, ((self.text, self.label),), hint, on_error=on_error)


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

    files: JSON lines, JSON lists or Parquet tables;  val: the same, for validation
    pad_id: the tokenizer's [PAD]
    val_fraction: without `val`, about this share of the texts, by their hash: a text that occurs twice is in one part;
        None: 0.1
    seq_len: tokens of a sequence, [CLS] and [SEP] counted; longer texts are cut
    on_error: "stop" at a row without text or label, or "skip" and count such rows
    special_tokens: a special token spelled out in a text is that token; else it is plain text

    Raises HandgradError for a row without text or label, fewer than two labels, and as `build` does.
    """
    if seq_len < LEAST:
        raise HandgradError("data", f"seq_len must be at least {LEAST} tokens", seq_len)
    share = share_of_val(val, val_fraction, 0.1)
    check_on_error(on_error, ("stop", "skip"))
    labels, skipped = _labels([*files, *val], columns, on_error)
    if len(labels) > min(tokenizer.vocab_size, MOST_LABELS):
        rule = f"there must be at most {min(tokenizer.vocab_size, MOST_LABELS):,} labels"
        raise HandgradError("data", rule, f"{len(labels):,}")
    record, index = seq_len - 1, {label: number for number, label in enumerate(labels)}

    def parts(paths: Sequence[Path], split: str, low: float, high: float) -> list[Part]:
        document = partial(_document, columns=columns, index=index, share=(low, high))
        jobs = partial(rows_of, wanted=columns.wanted(document, on_error))
        return [local_part(path, jobs, split) for path in paths]

    found = parts(files, "train", share, 1.0) + parts(val or files, "val", 0.0, 1.0 if val else share)
    size = sum(part.size for part in found)
    settings = Settings(
        shard_tokens=max(shard_tokens // record, 1) * record,
        wants_val=bool(val) or share > 0,
        workers=workers or min(cpus(), 1 + size // WORKER_BYTES),
        replace=replace,
        # both parts of a file without `val` pass its bad rows, which are counted once
        about={"labels": labels, "record": record} | ({"skipped": skipped} if skipped else {}),
        special=special_tokens,
        on_error=on_error,
    )
    return build("labels", found, out_dir, Records(tokenizer, pad_id, record), settings, progress)


@dataclass(frozen=True)
class Records:
    """An `Encoder` of documents "INDEX TEXT", where INDEX is that of the label: each becomes a record."""

    inner: Encoder
    pad_id: int
    record: int
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
        ids = self.inner.encode(said, special)
        ids = ids[ids != self.pad_id][: self.record - 1]
        found = np.full(self.record, self.pad_id, np.int32)
        found[0], found[1 : 1 + len(ids)] = int(label), ids
        return found


def _labels(paths: Sequence[Path], columns: Columns, on_error: str) -> tuple[list[str], int]:
    """Returns (all labels, numbers by size, texts by the alphabet; rows that are skipped)."""
    wanted, labels, skipped = columns.wanted(partial(_pair, columns=columns), on_error), set(), 0
    for path in paths:
        for _, job in rows_of(path, wanted):
            for found in job.read(*job.arguments):
                if isinstance(found, Damage):
                    skipped += found.skipped
                else:
                    labels.add(found[0])
    if len(labels) < 2:
        left = f": {skipped:,} rows are left out" if skipped else ""
        rule = f"the texts must have two labels or more under {columns.label!r}"
        raise HandgradError("data", rule, f"{len(labels)}{left}")
    return sorted(labels, key=int if all(label.isdecimal() for label in labels) else None), skipped


def _pair(row: object, where: str, columns: Columns) -> tuple[str, str]:
    """Returns (label, text) of a row. Raises HandgradError if it lacks one."""
    text = text_in(json_object(row, where), where, columns.text)
    assert isinstance(row, dict)
    value = row.get(columns.label)
    if type(value) is bool or not isinstance(value, str | int):
        rule = f"{where}: an object must hold a label, text or a whole number, under {columns.label!r}"
        hint = "" if columns.label in row else "--label names another column"
        raise HandgradError("data", rule, json_kind(value) if columns.label in row else "none", hint=hint)
    return repaired(str(value))[0], text


def _document(
    row: object, where: str, columns: Columns, index: Mapping[str, int], share: tuple[float, float]
) -> str | None:
    """Returns "INDEX TEXT" of a row, if its text has a hash in this share."""
    label, text = _pair(row, where, columns)
    low, high = share
    return f"{index[label]} {text}" if low <= zlib.crc32(json.dumps(text).encode()) / 2**32 < high else None
