"""The cache on disk: compiled kernels, chosen algorithms, attention plans.

A folder that cannot be written costs time, never a run: what it holds is still read, the rest goes into a folder of
this process, and one line on standard error says so.
"""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache as once
from pathlib import Path


def folder() -> Path | None:
    """HANDGRAD_CACHE if it is set, else handgrad/ in the user's cache folder; None for a user without a home."""
    chosen = os.environ.get("HANDGRAD_CACHE")
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        base = None
    if chosen or base is None:
        return Path(chosen) if chosen else None
    return Path(base) / "handgrad"


def writable() -> Path | None:
    """A folder that can be written: the cache, else this process's own, else None."""
    for place in _places():
        try:
            _write(place, "probe", b"x" * 4096)
            (place / "probe").unlink(missing_ok=True)
            return place
        except (OSError, ValueError):  # a ValueError: a name that no file can have
            continue
    return None


def key(*parts: object) -> str:
    """A file name: the hash of everything that a result depends on."""
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:40]


def load(name: str) -> bytes | None:
    """What was stored under this name, or None."""
    for place in filter(None, (folder(), *_OWN)):
        try:
            return (place / name).read_bytes()
        except (OSError, ValueError):
            continue
    return None


def store(name: str, content: bytes) -> None:
    """Stores content under a name: in the cache or, if it cannot be written, for this process."""
    for place in _places():
        try:
            return _write(place, name, content)
        except (OSError, ValueError):
            continue


_OWN: list[Path] = []  # at most one: the folder of this process


def _places() -> Iterator[Path]:
    """The cache, then this process's own folder, which is made when it is needed and removed when the process ends."""
    chosen = folder()
    if chosen is not None:
        yield chosen
    _warn("there is no home folder" if chosen is None else f"'{chosen}' cannot be written")
    if not _OWN:
        try:
            _OWN.append(Path(tempfile.mkdtemp(prefix="handgrad-")))
        except OSError:  # no folder for temporary files either
            return
        atexit.register(shutil.rmtree, _OWN[0], ignore_errors=True)
    yield _OWN[0]


def _write(place: Path, name: str, content: bytes) -> None:
    """Writes a file whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(temporary, place / name)
    except OSError:
        Path(temporary).unlink(missing_ok=True)  # of a full disk, say
        raise


@once
def _warn(reason: str) -> None:
    """Says why nothing is cached; the same reason once."""
    print(f"[cache] {reason}: every start compiles the kernels again. hint: HANDGRAD_CACHE=FOLDER", file=sys.stderr)
