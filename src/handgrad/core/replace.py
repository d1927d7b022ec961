"""What was written under a temporary name takes the place of an older file or folder. Whatever the instant at which the
process dies, a complete one has the name, or `restore` gives it back."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handgrad.core.disk import flush, is_alive

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write a file or folder under, for `replace`; removes what is left under it."""
    try:
        yield sibling(path, "tmp")
    finally:
        remove(sibling(path, "tmp"))


def sibling(path: Path, word: str, pid: int | None = None) -> Path:
    """The name of what a process (this one if None) keeps beside `path`: "tmp" is new, "old" was replaced."""
    return path.with_name(f"{path.name}.{word}-{os.getpid() if pid is None else pid}")


def replace(new: Path, path: Path) -> None:
    """Gives the file or folder `new` the name `path`, complete and on disk; removes what had the name.

    A folder swaps names with an older one in one system call. A file system that cannot do that (NFS) renames twice,
    and for the time between them the older one is called `path.old-<pid>`.
    """
    flush_tree(new)
    if not (path.is_dir() or (new.is_dir() and path.exists())):  # one rename does it
        os.replace(new, path)
    elif not exchange(new, path):
        old = sibling(path, "old")
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(new)
    flush(path.parent)
    remove(new)


def exchange(a: Path, b: Path) -> bool:
    """Swaps two names at once; False, with nothing changed, where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library other than glibc
        return False
    if rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def restore(path: Path) -> None:
    """Removes what dead processes left beside `path`. If nothing has the name, the newest older one gets it back."""
    old = [sibling(path, "old", pid) for pid in dead_writers(path, "old")]
    if old and not os.path.lexists(path):
        max(old, key=lambda left: left.stat().st_mtime).rename(path)
        flush(path.parent)
    for word in ("tmp", "old"):
        for pid in dead_writers(path, word):
            remove(sibling(path, word, pid))


def dead_writers(path: Path, word: str) -> list[int]:
    """The processes that have left something beside `path` and run no more, or are this one, which has not begun."""
    names = (re.fullmatch(rf"{re.escape(path.name)}\.{word}-(\d+)", p.name) for p in path.parent.glob("*"))
    return [pid for name in names if name and not is_alive(pid := int(name[1]))]


def flush_tree(path: Path) -> None:
    """Returns once a file, or a folder and everything in it, is on disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            flush(os.path.join(folder, name))
        flush(folder)
    if not path.is_dir():
        flush(path)


def remove(path: Path) -> None:
    """Removes a file, or a folder and everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
