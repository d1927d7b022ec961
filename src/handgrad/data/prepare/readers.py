"""Readers of the source formats. Each is a pair: one function splits a file into jobs, the other reads a job.

The first takes the path of a file and yields (bytes of the file covered so far, Job). It runs in the process that
writes the shards and reads as little as possible. The second runs in a worker process and yields documents.
"""

import io
import json
import random
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.data.json_lines import json_kind, json_row, replaced
from handgrad.data.prepare.bounds import (
    BLOCK_BYTES,
    LONGEST_DOCUMENT,
    OPEN,
    Unfolding,
    blocks,
    checked_line,
    most_unfolded,
    readable,
    too_large,
)
from handgrad.data.prepare.workers import Damage, Job

BATCH_ROWS, BATCH_BYTES = 256, 2**24  # of a Parquet table, decoded at a time
LONGEST_ARCHIVE = 2**28  # bytes of an .xz that is read whole
LONGEST_LIST = 2**30  # bytes of a JSON list, which is read whole
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
        texts = [text_in(row, "story", f"{path}, story {number}").strip() for number, row in enumerate(rows)]
    yield from texts


def json_lines(path: Path, column: str, on_error: str = "stop") -> Iterator[tuple[int, Job]]:
    """JSON lines, plain or compressed. Compressed files are not seekable, so they are decompressed here.

    on_error: "stop" at the first line without text under `column`, "skip" and count such lines, or "replace" bytes that
        are no UTF-8 by U+FFFD and skip what then still has no text
    """
    if path.suffix in OPEN:
        for read, at, lines in blocks(path):
            yield read, Job(_lines, (path, lines, at, column, on_error))
        return
    size = path.stat().st_size
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)
        yield stop, Job(_lines_between, (path, start, stop, column, on_error))


def _lines_between(path: Path, start: int, stop: int, column: str, on_error: str = "stop") -> Iterator[str | Damage]:
    """Yields the documents of the lines that begin in bytes start..stop."""
    with readable(path), path.open("rb") as file:
        if start:
            file.seek(start - 1)
            checked_line(file.readline(LONGEST_DOCUMENT + 1), path, start - 1)
        at = file.tell()
        while at < stop and (line := file.readline(LONGEST_DOCUMENT + 1)):
            checked_line(line, path, at)
            yield from _lines(path, [line], at, column, on_error)
            at += len(line)


def _lines(path: Path, lines: Iterable[bytes], at: int, column: str, on_error: str = "stop") -> Iterator[str | Damage]:
    for line in lines:
        if line.strip():
            yield from _line(line, f"{path}, line at byte {at}", column, on_error)
        at += len(line)


def _line(line: bytes, where: str, column: str, on_error: str) -> list[str | Damage]:
    """Returns the text of a line of JSON, and its damage."""
    try:
        return [text_in(json_row(line, where), column, where)]
    except HandgradError as error:
        if on_error == "stop":
            raise _with_hint(error) from None
    whole, count = replaced(line)
    if on_error == "replace" and count:
        with suppress(HandgradError):
            return [text_in(json_row(whole.encode(), where), column, where), Damage(replaced=count)]
    return [Damage(skipped=1)]


def _with_hint(error: HandgradError) -> HandgradError:
    hint = error.hint or "--on-error skip leaves such rows out, and counts them"
    return HandgradError(error.where, error.rule, error.got, hint=hint)


def json_list(path: Path, column: str, on_error: str = "stop") -> Iterator[tuple[int, Job]]:
    """A JSON list of texts, or of objects with text under `column`, plain or compressed, as one job.

    on_error: as in `json_lines`. A list that is no JSON is an error in any case: where its rows end is unknown.
    """
    yield path.stat().st_size, Job(_listed, (path, column, on_error))


def _listed(path: Path, column: str, on_error: str = "stop") -> Iterator[str | Damage]:
    hint = "one object a line may be of any size: jq -c '.[]' FILE | handgrad data jsonl"
    with readable(path), path.open("rb") as raw:
        size = path.stat().st_size
        content = Unfolding(path, raw, size, path.suffix).read(LONGEST_LIST + 1)
        if len(content) > LONGEST_LIST:
            rule = f"{path}: a JSON list must have at most {LONGEST_LIST:,} bytes"
            raise HandgradError("data", rule, f"{max(size, len(content)):,}", hint=hint)
        whole, count = replaced(content) if on_error == "replace" else (content, 0)
        rows = json.loads(whole)
    if not isinstance(rows, list):
        raise HandgradError("data", f"{path} must hold a JSON list", json_kind(rows), hint="handgrad data jsonl FILE")
    if count:
        yield Damage(replaced=count)
    for number, row in enumerate(rows):
        try:
            yield row if isinstance(row, str) else text_in(row, column, f"{path}, row {number}")
        except HandgradError as error:
            if on_error == "stop":
                raise _with_hint(error) from None
            yield Damage(skipped=1)


def text_in(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", json_kind(row))
    if column not in row:
        found = f"one with {', '.join(map(repr, row))}" if row else "an empty one"
        hint = "--column names another column" if column == "text" else ""
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", found, hint=hint)
    if not isinstance(row[column], str):
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", json_kind(row[column]))
    return row[column]


def table(path: Path, column: str, on_error: str = "stop") -> Iterator[tuple[int, Job]]:
    """A Parquet file, one job per row group. on_error: as in `json_lines`."""
    with readable(path), parquet().ParquetFile(path) as file:
        names, groups = file.schema_arrow.names, file.num_row_groups
    if column not in names:
        raise HandgradError("data", f"{path} must have a column {column!r}", ", ".join(names))
    size = path.stat().st_size
    for group in range(groups):
        yield size * (group + 1) // groups, Job(_rows, (path, group, column, on_error))


def _rows(path: Path, group: int, column: str, on_error: str = "stop") -> Iterator[str | Damage]:
    for _ in batches(path, group, column):
        pass  # refuses a row group that unfolds to too much before its first rows are tokenized, at 1/20 of their time
    for batch in batches(path, group, column):
        for text in _values(path, batch.column(0), on_error):
            rule = f"{path}, row group {group}: the column {column!r} must hold text"
            if isinstance(text, Damage):
                yield text
            elif not isinstance(text, str):
                if on_error == "stop":
                    raise _with_hint(HandgradError("data", rule, f"a {type(text).__name__}"))
                yield Damage(skipped=1)
            elif len(text) > LONGEST_DOCUMENT:
                raise HandgradError("data", f"{rule} of at most {LONGEST_DOCUMENT:,} characters", f"{len(text):,}")
            else:
                yield text


def _values(path: Path, column: Any, on_error: str) -> Iterator[Any]:
    """Yields the values of a column, and the damage of texts that are no UTF-8: a column of text need not be."""
    if on_error == "stop":
        with readable(path):
            values = column.to_pylist()
        yield from values
        return
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            text, count = replaced(value.as_buffer().to_pybytes())
            yield from (text, Damage(replaced=count)) if on_error == "replace" else [Damage(skipped=1)]


def batches(path: Path, group: int, column: str | None = None) -> Iterator[Any]:
    """Yields a row group of a Parquet file, all of it or a column, as record batches of at most BATCH_ROWS rows.

    A value is at most as long as its column before it is decompressed, which the file's metadata give: batches of a
    column of long values have few rows. A value that the file stores once may stand in every row, so what the rows
    hold is counted, too. Raises HandgradError for a damaged file, and for one that unfolds to too much.
    """
    with readable(path), parquet().ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
        about = file.metadata.row_group(group)
        chunks = [about.column(index) for index in range(about.num_columns)]
        wanted = [chunk for chunk in chunks if column is None or f"{chunk.path_in_schema}.".startswith(f"{column}.")]
        decoded = sum(chunk.total_uncompressed_size for chunk in wanted)
        most = most_unfolded(sum(chunk.total_compressed_size for chunk in wanted), file.num_row_groups)
        error = too_large(path, most)
        if decoded > most:
            raise error
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(decoded, 1)))
        columns = None if column is None else [column]
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            most -= batch.nbytes
            if most < 0:
                raise error
            yield batch


def archive(path: Path) -> Iterator[tuple[int, Job]]:
    """OpenWebText as published, .xz archives of text files, alone or several in a .tar: one job per .xz."""
    if path.suffix == ".xz":
        size = require_file(path, "a source", "data")
        yield size, Job(_archived, (path, 0, size))
        return
    with readable(path), tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.name.endswith(".xz"):
                yield member.offset_data + member.size, Job(_archived, (path, member.offset_data, member.size))


def _archived(path: Path, start: int, size: int) -> Iterator[str]:
    if size > LONGEST_ARCHIVE:
        raise HandgradError("data", f"{path}: an .xz archive must have at most {LONGEST_ARCHIVE:,} bytes", f"{size:,}")
    with readable(path):
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(size)
        shares = path.stat().st_size // max(size, 1)
        with Unfolding(path, io.BytesIO(raw), size, ".xz", shares).tar() as texts:
            for member in texts:
                if member.isfile() and (content := texts.extractfile(member)):
                    if member.size > LONGEST_DOCUMENT:  # a sparse file takes no bytes in the archive
                        rule = f"{path}: a text must have at most {LONGEST_DOCUMENT:,} bytes"
                        raise HandgradError("data", rule, f"{member.size:,} in {member.name}")
                    text = content.read().decode("utf-8")
                    yield re.sub(r"\n{3,}", BLANK_LINES, text).strip()  # page extraction left runs of blank lines


def parquet() -> Any:
    """Returns pyarrow.parquet. Raises HandgradError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        rule = "Parquet files are read by pyarrow"
        raise HandgradError("data", rule, "no such package", hint=install_command("parquet")) from None
    return pyarrow.parquet
