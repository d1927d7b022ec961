"""The folder of what is worth keeping between runs: compiled kernels, chosen algorithms, attention plans."""

import hashlib
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """HANDGRAD_CACHE, or handgrad/ in the user's cache folder."""
    chosen = os.environ.get("HANDGRAD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "handgrad"


def key(*parts: object) -> str:
    """A file name for all that a result depends on."""
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:40]


def load(name: str) -> bytes | None:
    """What was stored under this name, if anything."""
    try:
        return (folder() / name).read_bytes()
    except OSError:
        return None


def store(name: str, content: bytes) -> None:
    """Keeps content under a name. A cache that cannot be written is no error: the next run works again."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder())
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(temporary, folder() / name)
    except OSError:
        return
