"""Chats as shards of whole rows, and beside each shard the marks of the assistant's tokens.

Rows are tokenized in order, in one pass: unlike `build`, a killed run begins again. Which layouts a row may have:
messages.py.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from handgrad.core.disk import require_file, write_text
from handgrad.core.errors import HandgradError
from handgrad.data.meta import sha256_of
from handgrad.data.prepare.build import Progress, check_replaces, claimed, install
from handgrad.data.prepare.messages import Chat, chats
from handgrad.data.prepare.readers import parse_row, rows_of
from handgrad.data.prepare.recipes import check_on_error, share_of_val
from handgrad.data.prepare.text import paths_of
from handgrad.data.prepare.workers import Damage, Encoder
from handgrad.data.shards import BEGINS, MARK, id_dtype, write_shard

TEMPLATE = "chat_template.jinja"  # in the folder: what made the shards, for who reads them
TOGETHER = 256  # rows that are encoded at a time


class ChatEncoder(Protocol):
    """What chat data need of a template and its tokenizer: `handgrad.tokenizers.ChatEncoder`."""

    name: str
    source: str
    ends: tuple[int, ...]  # the token that ends a turn of the assistant, if there is one

    @property
    def tokens(self) -> Mapping[str, str]: ...  # the special tokens that the template is given, by name

    def encode(self, chats: Sequence[Chat]) -> list[tuple[np.ndarray, np.ndarray]]: ...


@dataclass
class _Split:
    """A split in the making: its shards so far, with the checksums of their files, and the rows of the next one.

    full: about the tokens of a shard
    learned: tokens of the assistant's;  held: tokens of the next shard
    """

    name: str
    folder: Path
    dtype: np.dtype
    full: int
    shards: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    learned: int = 0
    held: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        marks = mask.astype(MARK)
        marks[0] |= BEGINS
        self.ids.append(ids)
        self.marks.append(marks)
        self.held += ids.size
        self.rows, self.tokens, self.learned = self.rows + 1, self.tokens + ids.size, self.learned + int(mask.sum())
        if self.held >= self.full:
            self.write()

    def write(self) -> None:
        """Writes the rows as the next shard, if there are any."""
        if not self.ids:
            return
        path = self.folder / f"{self.name}_{len(self.shards):06d}.bin"
        for file, pieces, kind in ((path, self.ids, self.dtype), (path.with_suffix(".mask"), self.marks, MARK)):
            write_shard(file, pieces, kind)
            self.sums[file.name] = sha256_of(file)
        self.shards.append(path.name)
        self.ids, self.marks, self.held = [], [], 0

    def about(self) -> dict[str, Any]:
        """What meta.json says of it."""
        return {"tokens": self.tokens, "assistant": self.learned, "rows": self.rows, "shards": self.shards}


@dataclass(frozen=True)
class EncodedRow:
    """A chat as it is learned. where: its place;  ids: (n,) int32;  mask: (n,) uint8, 1 for the assistant's"""

    where: str
    ids: np.ndarray
    mask: np.ndarray

    def runs(self) -> list[tuple[bool, np.ndarray]]:
        """Returns (whether they are learned, ids) of the pieces of the row, in order.

        >>> EncodedRow("", np.array([5, 6, 7]), np.array([0, 0, 1])).runs()
        [(False, array([5, 6])), (True, array([7]))]
        """
        bounds = np.flatnonzero(np.diff(self.mask)) + 1
        begins = [0, *bounds.tolist()]
        return [(bool(self.mask[at]), ids) for at, ids in zip(begins, np.split(self.ids, bounds), strict=True)]


def read_chats(
    files: str | Path | Sequence[str | Path],
    encoder: ChatEncoder,
    on_error: str = "stop",
    read: Callable[[int], None] = lambda size: None,
) -> Iterator[EncodedRow | Damage]:
    """Yields the chats in files, and a `Damage` for a row that is skipped. See `prepare_chat`.

    read: called with the bytes of the files that were read so far
    """
    before = 0
    for path in paths_of(files):
        for size, job in rows_of(path, chats(on_error)):
            found = iter(job.read(*job.arguments))
            while some := list(islice(found, TOGETHER)):
                yield from (row for row in some if isinstance(row, Damage))
                yield from _encoded(encoder, [row for row in some if not isinstance(row, Damage)], on_error)
                read(before + size)
        before += path.stat().st_size


def _encoded(encoder: ChatEncoder, found: Sequence[Chat], on_error: str) -> list[EncodedRow | Damage]:
    """Encodes chats together; one by one if there is an error among them."""

    def one(chat: Chat, where: str) -> EncodedRow:
        [pair] = encoder.encode([chat])
        return _learnable(where, *pair)

    with suppress(HandgradError):
        return [_learnable(chat[0], *pair) for chat, pair in zip(found, encoder.encode(found), strict=True)]
    return [row for chat in found for row in parse_row(one, chat, chat[0], on_error)]


def _learnable(where: str, ids: np.ndarray, mask: np.ndarray) -> EncodedRow:
    if not mask[1:].any():
        rule = f"{where}: a row must have a token of the assistant's"
        raise HandgradError(
            "data", rule, f"none of {ids.size}", hint="an empty reply, or weights of 0? leave the row out"
        )
    return EncodedRow(where, ids, mask)


def prepare_chat(
    files: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: Encoder,
    encoder: ChatEncoder,
    *,
    val: str | Path | Sequence[str | Path] = (),
    val_fraction: float | None = None,
    on_error: str = "stop",
    shard_tokens: int = 10_000_000,
    replace: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Writes shards, marks, the template, meta.json and SHA256SUMS of chats into `out_dir`; returns the meta.json.

    files, val: JSON lines, JSON lists, CSV or Parquet tables, one path or several; val are the validation set
    tokenizer, encoder: a `handgrad.tokenizers.Tokenizer`, and a `handgrad.tokenizers.ChatEncoder` made with it
    val_fraction: without `val`, share of the rows that becomes val, evenly spread; at least one unless 0; None: 0.05
    on_error: "stop" at a row that is no chat to learn, or "skip" and count such rows
    shard_tokens: about the tokens of a full shard, which holds whole rows
    replace: the folder's shards of another source, template or tokenizer are replaced
    progress: called with (bytes of the source read, bytes of the source, tokens written)

    The folder changes only when everything is written. Raises HandgradError, which names the line, for a row that is no
    chat, has an unknown role or nothing of the assistant's to learn, or that the template does not take; for a split
    without rows; and as `build` does.
    """
    fraction = share_of_val(val, val_fraction, 0.05)
    check_on_error(on_error, ("stop", "skip"))
    if shard_tokens < 1:
        raise HandgradError("data", "shard_tokens must be at least 1", shard_tokens)
    paths, held, out_dir, dtype = paths_of(files), paths_of(val), Path(out_dir), id_dtype(tokenizer.vocab_size)
    try:
        with claimed(out_dir) as building:
            for left in building.iterdir():  # of a run that was killed
                if left.is_file() and left.name != "lock":
                    left.unlink()
            meta: dict[str, Any] = {"tokenizer": tokenizer.save(building), "source": _source(paths, held, encoder)}
            if not replace:
                check_replaces(out_dir, meta)
            splits = [_Split(name, building, dtype, shard_tokens) for name in ("train", "val")]
            about = _write(paths, held, encoder, splits, fraction, on_error, progress)
            write_text(building / TEMPLATE, encoder.source)
            sums = splits[0].sums | splits[1].sums | {TEMPLATE: sha256_of(building / TEMPLATE)}
            meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name} | about
            meta |= {split.name: split.about() for split in splits}
            install(building, out_dir, meta, sums)
    except OSError as error:
        raise HandgradError("data", f"{out_dir} must be writable", error.strerror) from None
    return meta


def _write(
    paths: Sequence[Path],
    held: Sequence[Path],
    encoder: ChatEncoder,
    splits: Sequence[_Split],
    fraction: float,
    on_error: str,
    progress: Progress,
) -> dict[str, Any]:
    """Writes all rows; returns what meta.json says of them. Raises HandgradError if a split has none."""
    size = sum(path.stat().st_size for path in [*paths, *held])
    (train, val), before, longest, skipped = splits, 0, 0, 0

    def read(done: int) -> None:
        progress(before + done, size, train.tokens + val.tokens)

    for files, share in ((paths, fraction), (held, 1.0)):
        total, left = 0, skipped
        for row in read_chats(files, encoder, on_error, read):
            if isinstance(row, Damage):
                skipped += row.skipped
                continue
            split = val if ceil((total + 1) * share) > ceil(total * share) else train
            split.add(row.ids, row.mask)
            total, longest = total + 1, max(longest, row.ids.size)
        if files and not total:
            raise _without_rows(files, skipped - left)
        if files and share < 1 and not train.rows:
            rule = f"val_fraction {fraction} must leave rows for train"
            raise HandgradError("data", rule, f"{total} in all", hint="--val-fraction 0 makes no val")
        before = sum(path.stat().st_size for path in files)
    for split in splits:
        split.write()
    about = {"template": encoder.name, "longest": longest, "tokens": dict(encoder.tokens), "ends": list(encoder.ends)}
    return {"chat": about} | ({"skipped": skipped} if skipped else {})


def _without_rows(files: Sequence[Path], skipped: int) -> HandgradError:
    got = f"0 in {len(files)} file{'s' * (len(files) != 1)}"
    if not skipped:
        return HandgradError("data", f"{files[0]} must hold rows", got)
    hint = "without --on-error skip the first of them says why"
    return HandgradError("data", f"{files[0]} must hold rows", f"{got}: {skipped:,} left out", hint=hint)


def _source(paths: Sequence[Path], held: Sequence[Path], encoder: ChatEncoder) -> dict[str, Any]:
    """Returns what meta.json says of the source; it depends on the files' contents, not on their folder."""
    for path in [*paths, *held]:
        require_file(path, "a source", "data")
    parts = [*map(sha256_of, paths), hashlib.sha256(encoder.source.encode()).hexdigest(), *map(sha256_of, held)]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    about = {"recipe": "chat", "files": len(paths), "first": paths[0].name, "sha256": digest}
    return about | ({"val_files": len(held)} if held else {})
