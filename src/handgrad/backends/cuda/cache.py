"""The cache on disk: compiled kernels, chosen algorithms, attention plans."""

import hashlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """HANDGRAD_CACHE if it is set, else handgrad/ in the user's cache folder."""
    chosen = os.environ.get("HANDGRAD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "handgrad"


def key(*parts: object) -> str:
    """A file name: the hash of everything that a result depends on."""
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:40]


def load(name: str) -> bytes | None:
    """What was stored under this name, or None."""
    try:
        return (folder() / name).read_bytes()
    except OSError:
        return None


def store(name: str, content: bytes) -> None:
    """Stores content under a name. Does nothing if the cache cannot be written."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder())
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(temporary, folder() / name)
    except OSError:
        return
