"""What a source may unfold to.

A compressed file, a Parquet table and an archive of a few kilobytes can stand for terabytes, and a line of JSON for a
hundred times its own memory. Everything that is read of them passes through here and is refused at a bound, before it
is held. Plain files only cost what they weigh on disk, but a line of one is bounded, too.
"""

import bz2
import csv
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError, one_line
from handgrad.core.install import install_command

LONGEST_DOCUMENT = 2**25  # bytes. Common Crawl cuts pages at 5 MiB; an unabridged dictionary has 27 MB
MOST_UNFOLDED = 256  # bytes for a byte of the source: text shrinks 3 to 20 times, lists of the same row 100 times
FREE = 2**20  # bytes that the smallest source may unfold to: tokenized in a second, whatever they are
BLOCK_BYTES = 2**20  # of lines read together

DAMAGE = (lzma.LZMAError, zlib.error, tarfile.TarError, csv.Error)  # raised besides OSError and ValueError


@cache
def zstd_module() -> Any:
    """Returns the module for .zst files, Python's own from 3.14 on; None if there is none."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            return None
    return zstd


def open_zstd(raw: BinaryIO) -> Any:
    """Opens a .zst file. Raises HandgradError without a module for it."""
    if zstd_module() is None:
        rule, hint = ".zst files are read by Python 3.14, or by backports.zstd", install_command("zstd")
        raise HandgradError("data", rule, "no such package", hint=hint)
    return zstd_module().open(raw)


OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": open_zstd}


def most_unfolded(packed: int, shares: int = 1) -> int:
    """Returns the bytes that `packed` bytes of a source may unfold to; `shares`: parts that FREE is divided among."""
    return max(FREE // max(shares, 1), MOST_UNFOLDED * packed)


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

    The file may be .gz, .xz, .bz2 or .zst; places are in the decompressed text. Raises HandgradError for a damaged
    file, and for one that unfolds to too much.
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


def _damage() -> tuple[type[Exception], ...]:
    return (OSError, EOFError, ValueError, *DAMAGE, *([zstd_module().ZstdError] if zstd_module() else ()))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Re-raises what reading a damaged file raises in the block as a HandgradError that names `path`."""
    try:
        yield
    except RecursionError:
        raise HandgradError("data", f"{path} must be readable and whole", "JSON nested too deeply") from None
    except _damage() as error:
        reason = one_line(error).rstrip(".")
        raise HandgradError("data", f"{path} must be readable and whole", reason) from None
