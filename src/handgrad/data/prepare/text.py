"""Text files, read in pieces that end between words.

A piece is 256 KiB and ends where a space or line break follows another character. GPT-2's pattern always splits there,
so the ids of the pieces are those of the whole text; other tokenizers may merge across such a cut.
"""

import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.data.json_lines import replaced
from handgrad.data.meta import sha256_of
from handgrad.data.prepare.bounds import BLOCK_BYTES, OPEN, Unfolding, readable
from handgrad.data.prepare.build import Part
from handgrad.data.prepare.workers import Damage, Job

PIECE_BYTES = 2**18
_LONGEST_WORD = 2**14  # bytes; a longer word is cut between any two characters
# a one-, two- or three-byte character outside all white space, before a space or line break
_CUT = re.compile(rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe3-\xed][\x81-\xbf][\x80-\xbf])(?=[ \n])")


def read_text(files: str | Path | Iterable[str | Path]) -> Iterator[str]:
    """Yields the text of `files`, one path or several, in pieces of up to 256 KiB.

    Raises HandgradError if one is missing or not UTF-8.

    >>> sum(len(piece) for piece in read_text(shakespeare()))
    1123762
    """
    for path in paths_of(files):
        for start, stop in _pieces(path, 0, require_file(path, "a text", "data")):
            yield read_span(path, start, stop)


def paths_of(files: str | Path | Iterable[str | Path]) -> list[Path]:
    """Returns one path or several as a list."""
    return [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]


def shakespeare() -> Path:
    """Returns the path of the packaged text: 40,000 lines of nine Shakespeare plays, 64 distinct characters."""
    return Path(__file__).parent.parent / "shakespeare.txt"


def split_text(
    files: str | Path | Iterable[str | Path], val_fraction: float
) -> tuple[list[Part], Iterator[str], Iterator[str]]:
    """Returns (parts, the text of train, the text of val) of plain files, split as `text_parts` does."""
    parts = text_parts(paths_of(files), val_fraction)
    return parts, _of_split(parts, "train"), _of_split(parts, "val")


def _of_split(parts: Sequence[Part], split: str) -> Iterator[str]:
    for part in parts:
        if part.split == split:
            for _, job in part.jobs(part.get()):
                yield from (text for text in job.read(*job.arguments) if isinstance(text, str))


def unfolded(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Returns the files `paths`, the compressed ones as plain files in `folder`: a text is read from any place in it.

    Raises HandgradError for a file that is missing or damaged, or unfolds to too much; `folder` is then removed.
    """
    sizes = [require_file(path, "a text", "data") for path in paths]
    found = []
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if path.suffix not in OPEN:
            found.append(path)
            continue
        plain = folder / str(index) / path.stem
        try:
            plain.parent.mkdir(parents=True, exist_ok=True)
            with readable(path), path.open("rb") as raw, plain.open("wb") as file:
                text = Unfolding(path, raw, size, path.suffix)
                while block := text.read(BLOCK_BYTES):
                    file.write(block)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # unless something else lies there
                folder.parent.rmdir()
                folder.parent.parent.rmdir()
            raise
        found.append(plain)
    return found


def text_parts(paths: Sequence[Path], val_fraction: float, on_error: str = "stop") -> list[Part]:
    """Returns the parts of the files `paths` that are train, then those that are val, split at a character boundary.

    val_fraction: share of the bytes, at the end, that is val
    on_error: of bytes that are no UTF-8: "stop", "skip" the lines that hold them, or "replace" them by U+FFFD

    Raises HandgradError for a file that is missing, and if all are empty.
    """
    sizes = [require_file(path, "a text", "data") for path in paths]
    left = int(sum(sizes) * (1 - val_fraction))
    if sum(sizes) == 0:
        raise HandgradError("data", "the text must not be empty", f"0 bytes in {len(paths)} files")
    train: list[Part] = []
    val: list[Part] = []
    for path, size in zip(paths, sizes, strict=True):
        cut = min(left, size)
        left -= cut
        make = partial(_part, path, sha256_of(path), on_error)
        if 0 < cut < size:
            with path.open("rb") as file:
                file.seek(cut)
                cut += _continuation(file.read(3))
        if cut > 0:
            train.append(make(0, cut, "train"))
        if cut < size:
            val.append(make(cut, size, "val"))
    return train + val


def read_span(path: Path, start: int, stop: int) -> str:
    """Returns the text in bytes start..stop of `path`. Raises HandgradError if they are not readable UTF-8."""
    raw = _bytes_between(path, start, stop)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at offset {start + error.start}"
        raise HandgradError("data", f"{path} must be UTF-8 text", where) from None


def _bytes_between(path: Path, start: int, stop: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None
    if len(raw) < stop - start:
        raise HandgradError("data", f"{path} must not shrink while it is read", f"{start + len(raw)} bytes")
    return raw


def _part(path: Path, sha256: str, on_error: str, start: int, stop: int, split: str) -> Part:
    jobs = partial(_jobs, start=start, stop=stop, on_error=on_error)
    return Part(f"{path.name}:{start}", stop - start, sha256, lambda: path, jobs, split)


def _jobs(path: Path, start: int, stop: int, on_error: str) -> Iterator[tuple[int, Job]]:
    for begin, end in _pieces(path, start, stop):
        yield end - start, Job(_texts, (path, begin, end, on_error), continues=begin > 0)


def _texts(path: Path, start: int, stop: int, on_error: str) -> Iterator[str | Damage]:
    if on_error == "stop":
        yield read_span(path, start, stop)
        return
    raw = _bytes_between(path, start, stop)
    text, count = replaced(raw)
    if on_error == "replace" or not count:
        yield text
        yield Damage(replaced=count)
        return
    lines = io.BytesIO(raw).readlines()
    whole = [text for text, count in map(replaced, lines) if not count]
    yield "".join(whole)
    yield Damage(skipped=len(lines) - len(whole))


def _pieces(path: Path, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges (begin, end) of the pieces of start..stop."""
    try:
        with path.open("rb") as file:
            while start < stop:
                end = min(start + PIECE_BYTES, stop)
                while end < stop:
                    window = max(start, end - _LONGEST_WORD)
                    file.seek(window)
                    cuts = [match.end() for match in _CUT.finditer(file.read(end + 1 - window))]
                    if cuts:
                        end = window + cuts[-1]
                        break
                    if end - start >= _LONGEST_WORD:
                        file.seek(end)
                        end += _continuation(file.read(3))
                        break
                    end = min(end + PIECE_BYTES, stop)
                yield start, end
                start = end
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None


def _continuation(raw: bytes) -> int:
    """Returns how many leading bytes of `raw` continue a character that began before it."""
    return next((index for index, byte in enumerate(raw) if byte >> 6 != 0b10), len(raw))
