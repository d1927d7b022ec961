"""Token shards in both of llm.c's formats: a header of 256 int32, then the token ids.

    header[0]  magic    20240520: uint16 ids, version 1      20240801: uint32 ids, version 7
    header[1]  version
    header[2]  number of ids, low 32 bits
    header[3:] zero

All little-endian. The header's count has 32 bits and wraps for shards of 2**32 ids or more; `open_shard` therefore
computes the count from the file size and requires the header to agree with it modulo 2**32, so a truncated or extended
file is always detected.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from handgrad.core.disk import flush, temporary
from handgrad.core.errors import HandgradError

HEADER_BYTES = 256 * 4
FORMATS: dict[int, tuple[int, np.dtype]] = {  # magic: (version, dtype of an id)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}


def id_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest shard dtype that holds ids below `vocab_size`.

    >>> id_dtype(50257), id_dtype(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """A token file whose header has been checked: its path, the dtype and the number of its ids."""

    path: Path
    dtype: np.dtype
    count: int

    def map(self) -> np.ndarray:
        """Returns the ids, (count,) uint16 or uint32, read-only and memory-mapped: only touched pages are read."""
        try:
            return np.asarray(np.memmap(self.path, self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.count,)))
        except (OSError, ValueError) as error:
            raise HandgradError("data", f"{self.path} must not change during a run", error) from None


def open_shard(path: str | Path) -> Shard:
    """Returns the `Shard` at `path` after checking its header against its size, without reading ids.

    Raises HandgradError for a file that is missing, empty, truncated, too long, or of another format or version.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_shard(folder + "/a.bin", [np.array([5, 6, 7])], id_dtype(10)).count
    ...     open_shard(folder + "/a.bin").map().tolist()
    3
    [5, 6, 7]
    """
    path = Path(path)
    if not path.is_file():
        raise HandgradError("data", "a token shard must be a file", f"{path}, which is {_kind(path)}")
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None
    if size == 0:
        raise HandgradError("data", f"{path} must hold tokens", "an empty file")
    if len(raw) < HEADER_BYTES:
        raise HandgradError("data", f"{path} must start with a header of {HEADER_BYTES} bytes", f"{size} bytes in all")
    magic, version, low_count = (int(word) for word in np.frombuffer(raw, "<u4", 3))
    if magic not in FORMATS:
        known = " or ".join(str(m) for m in FORMATS)
        hint = "make shards of a text with: handgrad data text FILE"
        raise HandgradError("data", f"{path} must start with the magic number {known}", magic, hint=hint)
    known_version, dtype = FORMATS[magic]
    if version != known_version:
        raise HandgradError("data", f"{path} (magic {magic}) must be version {known_version}", version)
    count, rest = divmod(size - HEADER_BYTES, dtype.itemsize)
    if rest or count % 2**32 != low_count:
        promised = HEADER_BYTES + low_count * dtype.itemsize
        rule = f"{path} must have {promised} bytes, as its header counts {low_count} tokens"
        raise HandgradError("data", rule, size, hint="a download or copy was truncated" if size < promised else "")
    if count == 0:
        raise HandgradError("data", f"{path} must hold tokens", "a header that counts 0")
    return Shard(path, dtype, count)


class ShardWriter:
    """Writes a token file by `append`; it appears under its name, complete and on disk, when the block ends.

    After an exception in the block neither the file nor its temporary exists, and an older file of that name is intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ShardWriter(folder + "/a.bin", id_dtype(10)) as shard:
    ...         shard.append([1, 2])
    ...         shard.append([3])
    ...     open_shard(folder + "/a.bin").count
    3
    """

    def __init__(self, path: str | Path, dtype: np.dtype):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._temporary = temporary(self.path)

    def __enter__(self) -> "ShardWriter":
        try:
            self._file = self._temporary.open("wb")
            self._file.write(bytes(HEADER_BYTES))
        except OSError as error:
            raise HandgradError("data", f"{self.path} must be writable", error.strerror) from None
        return self

    def append(self, ids: ArrayLike) -> None:
        """Writes `ids`, (n,) of any integer dtype. Raises HandgradError for an id that the dtype cannot hold."""
        ids = np.asarray(ids)
        if not ids.size:
            return
        low, high, limit = int(ids.min()), int(ids.max()), int(np.iinfo(self.dtype).max)
        if low < 0 or high > limit:
            rule = f"ids in a {self.dtype.name} shard must lie in 0..{limit}"
            raise HandgradError("data", rule, low if low < 0 else high)
        try:
            self._file.write(np.ascontiguousarray(ids, self.dtype).data)
        except OSError as error:
            raise HandgradError("data", f"{self.path} must be written", error.strerror) from None
        self.count += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._file.close()
        except OSError as failure:
            if kind is None:  # otherwise the exception in the block propagates
                raise HandgradError("data", f"{self.path} must be written", failure.strerror) from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        magic = next(m for m, (_, dtype) in FORMATS.items() if dtype == self.dtype)
        header = np.zeros(256, "<u4")
        header[:3] = magic, FORMATS[magic][0], self.count % 2**32
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        flush(self.path.parent)


def write_shard(path: str | Path, pieces: Iterable[ArrayLike], dtype: np.dtype) -> Shard:
    """Writes the id arrays `pieces` as one shard and returns it, holding one piece in memory at a time."""
    with ShardWriter(path, dtype) as writer:
        for ids in pieces:
            writer.append(ids)
    return Shard(writer.path, writer.dtype, writer.count)


def write_random(path: str | Path, count: int, vocab_size: int, seed: int = 0) -> Shard:
    """Writes and returns a shard of `count` uniformly random ids below `vocab_size`, for benchmarks."""
    rng, dtype = np.random.default_rng(seed), id_dtype(vocab_size)
    return write_shard(path, [rng.integers(0, vocab_size, count)], dtype)


def _kind(path: Path) -> str:
    if not path.exists():
        return "missing"
    return "a folder" if path.is_dir() else "not a regular file"
