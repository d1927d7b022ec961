"""Readers of the source formats. Each is a pair: one function splits a file into jobs, the other reads a job.

The first takes the path of a file and yields (bytes of the file covered so far, Job). It runs in the process that
writes the shards and reads as little as possible. The second runs in a worker process and yields documents.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.install import install
from handgrad.data.prepare.workers import Job

JOB_BYTES = 2**20
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BLANK_LINES = "\n\n"


def statements(path: Path) -> Iterator[tuple[int, Job]]:
    """A text file as one job: a blank line ends a document and belongs to it."""
    yield path.stat().st_size, Job(_statements, (path,))


def _statements(path: Path) -> Iterator[str]:
    with readable(path):
        *documents, last = path.read_text(encoding="utf-8").split(BLANK_LINES)
    yield from (document + BLANK_LINES for document in documents)
    yield last


def stories(path: Path, seed: int) -> Iterator[tuple[int, Job]]:
    """A TinyStories file, a JSON list, as one job. seed: of the order of its stories."""
    yield path.stat().st_size, Job(_stories, (path, seed))


def _stories(path: Path, seed: int) -> Iterator[str]:
    with readable(path):
        rows = json.loads(path.read_bytes())
        if not isinstance(rows, list):
            raise HandgradError("data", f"{path} must hold a JSON list of stories", f"a {type(rows).__name__}")
        random.Random(seed).shuffle(rows)
        texts = [_text(row, "story", f"{path}, story {number}").strip() for number, row in enumerate(rows)]
    yield from texts


def json_lines(path: Path, column: str) -> Iterator[tuple[int, Job]]:
    """JSON lines, plain or .gz, .xz, .bz2. Compressed files are not seekable, so they are decompressed here."""
    if path.suffix in OPEN:
        yield from _packed_lines(path, column)
        return
    size = path.stat().st_size
    for start in range(0, size, JOB_BYTES):
        stop = min(start + JOB_BYTES, size)
        yield stop, Job(_lines_between, (path, start, stop, column))


def _packed_lines(path: Path, column: str) -> Iterator[tuple[int, Job]]:
    with readable(path), path.open("rb") as raw, OPEN[path.suffix](raw) as lines:
        at = 0
        while block := lines.readlines(JOB_BYTES):
            yield raw.tell(), Job(_lines, (path, block, at, column))
            at += sum(map(len, block))


def _lines_between(path: Path, start: int, stop: int, column: str) -> Iterator[str]:
    """Yields the documents of the lines that begin in bytes start..stop."""
    with readable(path), path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        at = file.tell()
        while at < stop and (line := file.readline()):
            yield from _lines(path, [line], at, column)
            at += len(line)


def _lines(path: Path, lines: Iterable[bytes], at: int, column: str) -> Iterator[str]:
    for line in lines:
        if line.strip():
            where = f"{path}, line at byte {at}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HandgradError("data", f"{where}: must be JSON", error) from None
            yield _text(row, column, where)
        at += len(line)


def _text(row: object, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"one with {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        hint = "--column names another column" if column == "text" else ""
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", found, hint=hint)
    return whole(text, where)


def whole(text: str, where: str) -> str:
    """Returns `text`. Raises HandgradError for a lone surrogate, which an escape in JSON can produce."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"U+{ord(text[error.start]):04X} at {error.start}"
        raise HandgradError("data", f"{where}: text must be of whole characters", got) from None
    return text


def table(path: Path, column: str) -> Iterator[tuple[int, Job]]:
    """A Parquet file, one job per row group."""
    with readable(path), parquet().ParquetFile(path) as file:
        names, groups = file.schema_arrow.names, file.num_row_groups
    if column not in names:
        raise HandgradError("data", f"{path} must have a column {column!r}", ", ".join(names))
    size = path.stat().st_size
    for group in range(groups):
        yield size * (group + 1) // groups, Job(_rows, (path, group, column))


def _rows(path: Path, group: int, column: str) -> Iterator[str]:
    with readable(path), parquet().ParquetFile(path) as file:
        for batch in file.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    rule = f"{path}, row group {group}: the column {column!r} must hold text"
                    raise HandgradError("data", rule, f"a {type(text).__name__}")
                yield text


def archive(path: Path) -> Iterator[tuple[int, Job]]:
    """OpenWebText as published, .xz archives of text files, alone or several in a .tar: one job per .xz."""
    if path.suffix == ".xz":
        size = path.stat().st_size
        yield size, Job(_archived, (path, 0, size))
        return
    with readable(path), tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.name.endswith(".xz"):
                yield member.offset_data + member.size, Job(_archived, (path, member.offset_data, member.size))


def _archived(path: Path, start: int, size: int) -> Iterator[str]:
    with readable(path):
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(size)
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:xz") as texts:
            for member in texts:
                if member.isfile() and (content := texts.extractfile(member)):
                    text = content.read().decode("utf-8")
                    yield re.sub(r"\n{3,}", BLANK_LINES, text).strip()  # page extraction left runs of blank lines


def parquet() -> Any:
    """Returns pyarrow.parquet. Raises HandgradError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        rule = "Parquet files are read by pyarrow"
        raise HandgradError("data", rule, "no such package", hint=install("parquet")) from None
    return pyarrow.parquet


DAMAGE = (lzma.LZMAError, zlib.error, tarfile.TarError, csv.Error)  # raised besides OSError and ValueError


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Re-raises what reading a damaged file raises in the block as a HandgradError that names `path`."""
    try:
        yield
    except (OSError, EOFError, ValueError, *DAMAGE, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise HandgradError("data", f"{path} must be readable and whole", reason) from None
