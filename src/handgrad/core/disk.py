"""Files: a read begins at a regular file, and a written file appears complete and on disk, or not at all."""

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from handgrad.core.errors import HandgradError

PIPE_SECONDS = 1.0  # for the reader of a pipe to open it
_TEMPORARY = re.compile(r"\.?(.+)\.tmp-(\d+)")


def temporary(path: Path) -> Path:
    """The name under which this process prepares the file or folder `path`, or deletes it: .<name>.tmp-<pid>."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def sweep(folder: Path, names: str = ".*", is_locked: bool = False) -> None:
    """Deletes what processes that died left in a folder under the temporary names of what matches `names`.

    names: a regular expression
    is_locked: nobody but this process writes such names, so all go. Otherwise what an unrelated process of the same
        number seems to own stays

    The number of this process is always of an earlier one: call it before `temporary` names anything here.
    """
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and re.fullmatch(names, match[1]):
            if is_locked or not is_alive(int(match[2])):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_alive(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def require_file(path: str | Path, what: str, where: str, hint: str = "") -> int:
    """Returns the bytes of the regular file `path`. A link to one is one.

    what: what the file is for, as a sentence begins: "a token shard"
    where, hint: the error's

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
    raise HandgradError(where, f"{what} must be a file", f"{path}, which is {got}", hint=hint)


def write_whole(path: str | Path, pieces: Iterable[bytes]) -> None:
    """Writes the concatenated `pieces` to `path`, replacing an older file. Raises HandgradError if that fails.

    What a link leads to is replaced, not the link. A pipe or a device, such as /dev/stdout, is written as it is; a pipe
    that nobody reads is an error.
    """
    path = Path(path)
    try:
        is_special = path.exists() and not path.is_file()
        target = path if is_special else Path(os.path.realpath(path))  # a pipe's real path leads nowhere
        building = temporary(target)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise HandgradError("disk", f"{path} must be writable", getattr(error, "strerror", error)) from None
    try:
        with _open_special(path) if is_special else building.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            if is_special:
                return
            os.fsync(file.fileno())
        os.replace(building, target)
        flush(target.parent)
    except OSError as error:
        raise HandgradError("disk", f"{path} must be writable", error.strerror) from None
    finally:
        with suppress(OSError):
            building.unlink()


def _open_special(path: Path) -> BinaryIO:
    """Opens a pipe or a device for writing. Without a reader a pipe waits for ever: one has PIPE_SECONDS to come."""
    end = time.monotonic() + PIPE_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            os.set_blocking(handle, True)
            return os.fdopen(handle, "wb")


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of a text in UTF-8; what UTF-8 cannot hold becomes a question mark."""
    write_whole(path, [text.encode(errors="replace")])


def append(file: FileIO, data: bytes) -> None:
    """Writes all of `data` at the end of an unbuffered file, or nothing. Raises the OSError that stopped it."""
    end, left = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while left:
            left = left[file.write(left) or 0 :]  # a write may be short; the next one raises why
    except OSError:
        with suppress(OSError):  # half a line would spoil the next one
            file.truncate(end)
        raise


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
