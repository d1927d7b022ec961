"""What a source may unfold to, and rows of JSON read within these bounds.

A compressed file, a Parquet table and an archive of a few kilobytes can stand for terabytes, and a line of JSON for a
hundred times its own memory. Everything that is read of them passes through here and is refused at a bound, before it
is held. Plain files only cost what they weigh on disk, but a line of one is bounded, too.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError, one_line

LONGEST_DOCUMENT = 2**25  # bytes. Common Crawl cuts pages at 5 MiB; an unabridged dictionary has 27 MB
MOST_UNFOLDED = 256  # bytes for a byte of the source: text shrinks 3 to 20 times, lists of the same row 100 times
FREE = 2**20  # bytes that the smallest source may unfold to: tokenized in a second, whatever they are
BLOCK_BYTES = 2**20  # of lines read together

OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
DAMAGE = (lzma.LZMAError, zlib.error, tarfile.TarError, csv.Error)  # raised besides OSError and ValueError
# half a character in JSON: an escape, or bytes that json accepts
_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_HALVES = re.compile("[\ud800-\udfff]")


def most_unfolded(packed: int, shares: int = 1) -> int:
    """Returns the bytes that `packed` bytes of a source may unfold to; `shares`: parts that FREE is divided among."""
    return max(FREE // shares, MOST_UNFOLDED * packed)


def too_large(path: Path, most: int) -> HandgradError:
    """Returns the error of a source that unfolds to more than `most` bytes."""
    rule = f"{path} may unfold to {MOST_UNFOLDED} times its bytes and to {FREE:,}"
    return HandgradError("data", rule, f"more than {most:,}", hint="plain files may be of any size")


class Unfolding:
    """The content of an open file, decompressed, from its beginning on, as far as it may unfold.

    path: named in errors;  raw: the file;  size: its bytes
    ending: of OPEN; any other is a plain file, which unfolds to nothing else
    shares: as in `most_unfolded`
    """

    def __init__(self, path: Path, raw: BinaryIO, size: int, ending: str, shares: int = 1):
        self.path, self._read = path, 0
        self._file: Any = OPEN[ending](raw) if ending in OPEN else raw
        self._most = most_unfolded(size, shares) if ending in OPEN else 2**62

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes; fewer at the end only."""
        return self._counted(self._file.read(min(size, self._most - self._read + 1)))

    def readline(self) -> bytes:
        """Returns the rest of the line. Raises HandgradError if it is longer than LONGEST_DOCUMENT."""
        line = self._counted(self._file.readline(min(LONGEST_DOCUMENT, self._most - self._read) + 1))
        return checked_line(line, self.path, self._read - len(line))

    def tar(self) -> tarfile.TarFile:
        """Returns the content as a tar archive, whose members are read in order."""
        stream: Any = self
        return tarfile.open(fileobj=stream, mode="r|")

    def _counted(self, raw: bytes) -> bytes:
        self._read += len(raw)
        if self._read > self._most:
            raise too_large(self.path, self._most)
        return raw


def checked_line(line: bytes, path: Path, at: int) -> bytes:
    """Returns `line`. Raises HandgradError if it is longer than LONGEST_DOCUMENT."""
    if len(line) > LONGEST_DOCUMENT:
        rule = f"{path}, line at byte {at}: a line must have at most {LONGEST_DOCUMENT:,} bytes"
        raise HandgradError("data", rule, "more", hint="a long text is a file of its own: handgrad data text FILE")
    return line


def blocks(path: Path) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yields (bytes of the file read so far, place of the first line, lines), BLOCK_BYTES of lines at a time.

    The file may be .gz, .xz or .bz2; places are in the decompressed text. Raises HandgradError for a damaged file, and
    for one that unfolds to too much.
    """
    size = require_file(path, "a source", "data")
    with readable(path), path.open("rb") as raw:
        text, at = Unfolding(path, raw, size, path.suffix), 0
        while block := text.read(BLOCK_BYTES):
            if not block.endswith(b"\n"):
                block += text.readline()
            lines = io.BytesIO(block).readlines()
            checked_line(lines[-1], path, at + len(block) - len(lines[-1]))
            yield min(raw.tell(), size), at, lines
            at += len(block)


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (location for error messages, object) of each line of JSON that is not blank. See `blocks`, `json_row`."""
    number = 0
    for _, _, lines in blocks(path):
        for line in lines:
            number += 1
            if line.strip():
                where = f"{path}, line {number}"
                row = json_row(line, where)
                if not isinstance(row, dict):
                    raise HandgradError("data", f"{where}: must be a JSON object", json_kind(row))
                if _HALF.search(line):
                    row = json.loads(repaired(json.dumps(row, ensure_ascii=False))[0])
                yield where, row


def json_row(line: bytes, where: str) -> object:
    """Returns the value of a line of JSON. Raises HandgradError if it is damaged, or nested too deeply."""
    try:
        return json.loads(line)
    except RecursionError:
        raise HandgradError("data", f"{where}: must be JSON", "lists or objects nested too deeply") from None
    except ValueError as error:
        raise HandgradError("data", f"{where}: must be JSON", error) from None


def json_kind(value: object) -> str:
    """Returns what JSON calls a value."""
    kinds = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def repaired(text: str) -> tuple[str, int]:
    """Returns (`text` with U+FFFD for every lone half of a character, their number), as tiktoken reads it.

    An escape in JSON can produce such a half; two that belong together become their character.

    >>> repaired("a \\ud800 b")[1], repaired("\\ud83d\\ude00") == ("\\U0001f600", 0)
    (1, True)
    """
    if not _HALVES.search(text):
        return text, 0
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, whole.count("\N{REPLACEMENT CHARACTER}") - text.count("\N{REPLACEMENT CHARACTER}")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Re-raises what reading a damaged file raises in the block as a HandgradError that names `path`."""
    try:
        yield
    except RecursionError:
        raise HandgradError("data", f"{path} must be readable and whole", "JSON nested too deeply") from None
    except (OSError, EOFError, ValueError, *DAMAGE) as error:
        reason = one_line(error).rstrip(".")
        raise HandgradError("data", f"{path} must be readable and whole", reason) from None
