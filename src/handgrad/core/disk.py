"""Atomic, durable writes: a file appears under its name complete and on disk, or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from handgrad.core.errors import HandgradError


def write_whole(path: str | Path, pieces: Iterable[bytes]) -> None:
    """Writes the concatenated `pieces` to `path`, replacing an older file. Raises HandgradError if that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise HandgradError("disk", f"{path} must be writable", error.strerror) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of a text in UTF-8; what UTF-8 cannot hold becomes a question mark."""
    write_whole(path, [text.encode(errors="replace")])


def make_folder(path: str | Path) -> None:
    """Makes a folder, and those above it, unless they exist; the names survive a power failure. Raises OSError."""
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        flush(folder.parent)


def flush(path: str | Path) -> None:
    """Returns once what was written to a file, or the names in a folder, are on disk and survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
