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
        sync_folder(path.parent)
    except OSError as error:
        raise HandgradError("data", f"{path} must be writable", error.strerror) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: str | Path) -> None:
    """Flushes the names of new files in `folder` to disk, so that they survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
