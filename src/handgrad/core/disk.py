"""Files: a read begins at a regular file, and a written file appears complete and on disk, or not at all."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from handgrad.core.errors import HandgradError


def file_size(path: str | Path, what: str, where: str = "data") -> int:
    """Returns the bytes of the regular file `path`. A link to one is one.

    what: what the file is for, as a sentence begins: "a token shard"
    where: the error's

    Raises HandgradError for anything else, before it is opened: a pipe would wait forever, a device never end.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        got = "missing"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        got = f"not reachable: {getattr(error, 'strerror', None) or error}"
    else:
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        got = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
    raise HandgradError(where, f"{what} must be a file", f"{path}, which is {got}")


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


def flush(path: str | Path) -> None:
    """Returns once what was written to a file, or the names in a folder, are on disk and survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
