"""Readers of the source formats. Each is a pair: one function splits a file into jobs, the other reads a job.

The first takes the path of a file and yields (bytes of the file covered so far, Job). It runs in the process that
writes the shards and reads as little as possible. The second runs in a worker process and yields documents.

Files of rows are read in four formats, JSON lines, JSON lists, CSV and Parquet tables, by one rule: what a document is,
and what becomes of a row that has none, is `RowParser`.
"""

import csv
import io
import json
import math
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError, one_line
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
COLUMN = "--column names another column"
SEPARATORS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}


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
        texts = [text_in(row, f"{path}, story {number}", "story").strip() for number, row in enumerate(rows)]
    yield from texts


Parse = Callable[[Any, str], Any]


@dataclass(frozen=True)
class RowParser:
    """What a recipe makes of the rows of a file, whichever its format. It is sent to worker processes.

    parse: (row, its place for errors) -> a document, None for a row that belongs to another part; raises HandgradError
        for a row that is none
    layouts: columns, all of one of which a table (Parquet, CSV) must have;  hint: if it has not
    optional: columns that are read if it has them
    numbers: columns whose texts are numbers where a table has but texts
    on_error: "stop" at the first row that `parse` refuses, "skip" and count such rows, or "replace" bytes that are no
        UTF-8 by U+FFFD and skip what `parse` still refuses
    """

    parse: Parse
    layouts: tuple[tuple[str, ...], ...]
    hint: str = ""
    optional: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    on_error: str = "stop"

    def columns(self, path: Path, names: Sequence[str]) -> list[str]:
        """Returns those to read of a table with these names. Raises HandgradError if it lacks some."""
        if not any(set(layout) <= set(names) for layout in self.layouts):
            needed = ", or ".join(" and ".join(map(repr, layout)) for layout in self.layouts)
            raise HandgradError("data", f"{path} must have a column {needed}", ", ".join(names), hint=self.hint)
        return [name for name in dict.fromkeys((*chain(*self.layouts), *self.optional)) if name in names]


def texts(column: str, on_error: str = "stop", bare: bool = False) -> RowParser:
    """The text under `column`; bare: a row may be the text itself."""
    return RowParser(partial(text_in, column=column, bare=bare), ((column,),), COLUMN, on_error=on_error)


def text_in(row: object, where: str, column: str, bare: bool = False) -> str:
    """Returns the text of a row. Raises HandgradError if it has none."""
    if bare and isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", json_kind(row))
    if column not in row:
        found = f"one with {', '.join(map(repr, row))}" if row else "an empty one"
        hint = COLUMN if column == "text" else ""
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", found, hint=hint)
    if not isinstance(row[column], str):
        raise HandgradError("data", f"{where}: an object must hold text under {column!r}", json_kind(row[column]))
    return row[column]


def parse_row(parse: Parse, row: Any, where: str, on_error: str) -> list[Any]:
    """Returns what `parse` makes of a row, and the damage if that is an error. Raises it to "stop", with a hint."""
    try:
        found = parse(row, where)
    except HandgradError as error:
        if on_error == "stop":
            raise _with_hint(error) from None
        found = Damage(skipped=1)
    return [] if found is None else [found]


def _with_hint(error: HandgradError) -> HandgradError:
    hint = error.hint or "--on-error skip leaves such rows out, and counts them"
    return HandgradError(error.where, error.rule, error.got, hint=hint)


def rows_of(path: Path, parser: RowParser) -> Iterator[tuple[int, Job]]:
    """The rows of a file in the format that its name ends in: .parquet; .csv and .tsv; .json, where [ begins a list;
    else JSON lines.

    All but Parquet may be compressed. Raises HandgradError if the file is missing.
    """
    size = require_file(path, "a source", "data")
    if path.suffix == ".parquet":
        return table(path, parser)
    plain = path.with_suffix("") if path.suffix in OPEN else path
    if plain.suffix == ".json":
        with readable(path), path.open("rb") as raw:
            begin = Unfolding(path, raw, size, path.suffix).read(BLOCK_BYTES)
        if begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return json_list(path, parser)
    return separated(path, parser, plain.suffix) if plain.suffix in SEPARATORS else numbered_lines(path, parser)


def json_lines(path: Path, parser: RowParser) -> Iterator[tuple[int, Job]]:
    """JSON lines, plain or compressed. A job is a range of a plain file, so an error names the byte of its line.

    Compressed files are not seekable, so they are decompressed here.
    """
    if path.suffix in OPEN:
        yield from numbered_lines(path, parser)
        return
    size = path.stat().st_size
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)
        yield stop, Job(_lines_between, (path, start, stop, parser))


def _lines_between(path: Path, start: int, stop: int, parser: RowParser) -> Iterator[Any]:
    """Yields the documents of the lines that begin in bytes start..stop."""
    with readable(path), path.open("rb") as file:
        if start:
            file.seek(start - 1)
            checked_line(file.readline(LONGEST_DOCUMENT + 1), path, start - 1)
        at = file.tell()
        while at < stop and (line := file.readline(LONGEST_DOCUMENT + 1)):
            checked_line(line, path, at)
            if line.strip():
                yield from _line(line, f"{path}, line at byte {at}", parser)
            at += len(line)


def numbered_lines(path: Path, parser: RowParser) -> Iterator[tuple[int, Job]]:
    """JSON lines, plain or compressed. They are read here, so an error names the number of its line."""
    number = 1
    for read, _, lines in blocks(path):
        yield read, Job(_lines, (path, lines, number, parser))
        number += len(lines)


def _lines(path: Path, lines: Iterable[bytes], first: int, parser: RowParser) -> Iterator[Any]:
    for number, line in enumerate(lines, first):
        if line.strip():
            yield from _line(line, f"{path}, line {number}", parser)


def _line(line: bytes, where: str, parser: RowParser) -> list[Any]:
    """Returns the document of a line of JSON, and its damage."""

    def parse(raw: bytes, where: str) -> Any:
        return parser.parse(json_row(raw, where), where)

    found = parse_row(parse, line, where, parser.on_error)
    whole, count = replaced(line) if parser.on_error == "replace" and _is_skipped(found) else ("", 0)
    if not count:
        return found
    again = parse_row(parse, whole.encode(), where, parser.on_error)
    return again if _is_skipped(again) else [*again, Damage(replaced=count)]


def _is_skipped(found: list[Any]) -> bool:
    return bool(found) and isinstance(found[0], Damage)


def json_list(path: Path, parser: RowParser) -> Iterator[tuple[int, Job]]:
    """A JSON list, plain or compressed, as one job: a list that is no JSON is an error, as where a row ends is unknown.

    Rows count from 0.
    """
    yield path.stat().st_size, Job(_listed, (path, parser))


def _listed(path: Path, parser: RowParser) -> Iterator[Any]:
    hint = "one object a line may be of any size: jq -c '.[]' FILE > FILE.jsonl"
    with readable(path), path.open("rb") as raw:
        size = path.stat().st_size
        content = Unfolding(path, raw, size, path.suffix).read(LONGEST_LIST + 1)
        if len(content) > LONGEST_LIST:
            rule = f"{path}: a JSON list must have at most {LONGEST_LIST:,} bytes"
            raise HandgradError("data", rule, f"{max(size, len(content)):,}", hint=hint)
        whole, count = replaced(content) if parser.on_error == "replace" else (content, 0)
        rows = json.loads(whole)
    if not isinstance(rows, list):
        raise HandgradError("data", f"{path} must hold a JSON list", json_kind(rows), hint="handgrad data jsonl FILE")
    if count:
        yield Damage(replaced=count)
    for number, row in enumerate(rows):
        yield from parse_row(parser.parse, row, f"{path}, row {number}", parser.on_error)


def separated(path: Path, parser: RowParser, ending: str) -> Iterator[tuple[int, Job]]:
    """CSV or TSV, plain or compressed, whose first row names the columns. A row may take several lines, so rows are
    found here, and an error names the line where its row begins.

    Damage in a row of several lines is an error in any case: a quote is amiss, and where a row ends is unknown.
    """
    lines, found = _Lines(path), list[tuple[int, list[str], str]]()
    rows = _separated_rows(path, lines, csv.reader(lines, delimiter=SEPARATORS[ending][0], strict=True))
    number, names, problem = next(rows, (1, [], ""))
    if problem or not names:
        got = problem or "none"
        raise HandgradError("data", f"{path}, line {number}: the first row must name the columns", got)
    if len(names) == 1 and re.search("[,;\t]", names[0]):
        raise HandgradError("data", f"{path} must have {SEPARATORS[ending][1]} between fields", names[0])
    columns = parser.columns(path, names)
    if twice := [name for name in columns if names.count(name) > 1]:
        raise HandgradError("data", f"{path} must have one column {twice[0]!r}", names.count(twice[0]))
    about, size = (tuple(names), columns, parser), 0
    for row in rows:
        found.append(row)
        size += sum(map(len, row[1]))
        if size >= BLOCK_BYTES:
            yield lines.read, Job(_separated, (path, found, *about))
            found, size = [], 0
    yield lines.read, Job(_separated, (path, found, *about))


class _Lines:
    """The lines of a file as text, for csv.

    read: bytes of the file so far;  problem: of a line since it was last cleared, empty if there is none
    """

    def __init__(self, path: Path):
        self._lines = ((read, line) for read, _, lines in blocks(path) for line in lines)
        self.read, self.problem, self._encoding = 0, "", "utf-8-sig"  # a BOM may begin the first

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.read, line = next(self._lines)
        encoding, self._encoding = self._encoding, "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            self.problem = one_line(error)
            return line.decode(encoding, "replace")


def _separated_rows(path: Path, lines: _Lines, reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """Yields (line where it begins, fields, what is wrong with it) of each row that is not blank."""
    fields: list[str] | None = []
    while fields is not None:
        first, lines.problem, usual = reader.line_num + 1, "", csv.field_size_limit(LONGEST_DOCUMENT)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if reader.line_num > first:
                hint = "a quote in a field is doubled, and the field stands in quotes"
                raise HandgradError("data", f"{path}, line {first}: must be CSV", one_line(error), hint=hint) from None
            fields, lines.problem = [], one_line(error)
        finally:
            csv.field_size_limit(usual)  # a setting of the whole process
        if fields or lines.problem:
            yield first, fields or [], lines.problem


def _separated(
    path: Path,
    rows: Iterable[tuple[int, list[str], str]],
    names: Sequence[str],
    columns: Sequence[str],
    parser: RowParser,
) -> Iterator[Any]:
    def parse(row: tuple[list[str], str], where: str) -> Any:
        fields, problem = row
        if problem:
            raise HandgradError("data", f"{where}: must be CSV", problem)
        if len(fields) != len(names):
            rule = f"{where}: a row must have the {len(names)} fields of the first"
            raise HandgradError("data", rule, len(fields))
        found: dict[str, Any] = {name: value or None for name, value in zip(names, fields) if name in columns}
        found |= {name: _number(found[name]) for name in parser.numbers if found.get(name)}
        return parser.parse(found, where)

    for number, *row in rows:
        yield from parse_row(parse, row, f"{path}, line {number}", parser.on_error)


def _number(text: str) -> float | str:
    """Returns the number that a text spells, else the text.

    >>> _number(" -1.5e1"), _number("1_0"), _number("nan")
    (-15.0, '1_0', 'nan')
    """
    try:
        number = float(text if "_" not in text else "")
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def table(path: Path, parser: RowParser) -> Iterator[tuple[int, Job]]:
    """A Parquet file, one job per row group. Rows count from 0."""
    with readable(path), parquet().ParquetFile(path) as file:
        names, about = file.schema_arrow.names, file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    columns, size, first = parser.columns(path, names), path.stat().st_size, 0
    for group, count in enumerate(sizes):
        yield size * (group + 1) // len(sizes), Job(_rows, (path, group, first, columns, parser))
        first += count


def _rows(path: Path, group: int, first: int, columns: Sequence[str], parser: RowParser) -> Iterator[Any]:
    for _ in batches(path, group, columns):
        pass  # refuses a row group that unfolds to too much before its first rows are tokenized, at 1/20 of their time
    number = first
    for batch in batches(path, group, columns):
        for index, (row, damage) in enumerate(_objects(path, batch, parser.on_error)):
            where = f"{path}, row {number + index}"
            longest = max((len(value) for value in row.values() if isinstance(value, str)), default=0)
            if longest > LONGEST_DOCUMENT:
                rule = f"{where}: a text must have at most {LONGEST_DOCUMENT:,} characters"
                raise HandgradError("data", rule, f"{longest:,}")
            yield from [damage] if damage.skipped else parse_row(parser.parse, row, where, parser.on_error)
            if damage.replaced:
                yield damage
        number += batch.num_rows


def _objects(path: Path, batch: Any, on_error: str) -> Iterator[tuple[dict, Damage]]:
    """Yields the rows of a record batch, and the damage of texts that are no UTF-8: a column of text need not be.

    Objects in them lack the keys that are null: a table has every key of a column in every row.
    """
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if on_error == "stop":
            raise HandgradError("data", f"{path} must be readable and whole", one_line(error)) from None
        for values in zip(*batch.columns, strict=True):
            yield _decoded(dict(zip(batch.schema.names, values, strict=True)), on_error)
        return
    for row in rows:
        yield {name: _without_nulls(value) for name, value in row.items()}, Damage()


def _decoded(values: dict[str, Any], on_error: str) -> tuple[dict, Damage]:
    """Returns a row of values of pyarrow's, which may hold bytes that are no UTF-8, or dates that Python has not."""
    row, damage = {}, Damage()
    for name, value in values.items():
        try:
            row[name] = _without_nulls(value.as_py())
        except (ValueError, OverflowError):
            if on_error != "replace" or not hasattr(value, "as_buffer"):
                return {}, Damage(skipped=1)
            row[name], count = replaced(value.as_buffer().to_pybytes())
            damage += Damage(replaced=count)
    return row, damage


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def batches(path: Path, group: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yields a row group of a Parquet file, all of it or some columns, as record batches of at most BATCH_ROWS rows.

    A value is at most as long as its column before it is decompressed, which the file's metadata give: batches of
    columns of long values have few rows. A value that the file stores once may stand in every row, so what the rows
    hold is counted, too. Raises HandgradError for a damaged file, and for one that unfolds to too much.
    """
    with readable(path), parquet().ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
        about = file.metadata.row_group(group)
        chunks = [about.column(index) for index in range(about.num_columns)]
        begins = ("",) if columns is None else tuple(f"{column}." for column in columns)
        wanted = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(begins)]
        decoded = sum(chunk.total_uncompressed_size for chunk in wanted)
        most = most_unfolded(sum(chunk.total_compressed_size for chunk in wanted), file.num_row_groups)
        error = too_large(path, most)
        if decoded > most:
            raise error
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(decoded, 1)))
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
