"""Token shards in both of llm.c's formats: a header of 256 int32, then the token ids. Chat data add files of marks.

    header[0]  magic    20240520: uint16 ids, version 1      20240801: uint32 ids, version 7      20261201: marks
    header[1]  version
    header[2]  number of ids or marks, low 32 bits
    header[3:] zero

Marks are ours: train_000000.mask beside train_000000.bin has a uint8 for each of its ids, the sum of

    1  LEARNED  the assistant's: the model learns to predict the id
    2  BEGINS   the id is the first of a row

All little-endian. The header's count has 32 bits and wraps for shards of 2**32 ids or more; `open_shard` therefore
computes the count from the file size and requires the header to agree with it modulo 2**32, so a truncated or extended
file is always detected.
"""

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from handgrad.core.disk import flush, require_file, temporary
from handgrad.core.errors import HandgradError

HEADER_BYTES = 256 * 4
MARK = np.dtype("u1")
LEARNED, BEGINS = 1, 2
FORMATS: dict[int, tuple[int, np.dtype]] = {  # magic: (version, dtype of an id or a mark)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
    20261201: (1, MARK),
}


def id_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest shard dtype that holds ids below `vocab_size`.

    >>> id_dtype(50257), id_dtype(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True, repr=False)
class Shard:
    """A token file whose header has been checked.

    path, dtype, count: of the file; the dtype and the number of its ids
    file: its device and inode; another file under this path is another shard
    """

    path: Path
    dtype: np.dtype
    count: int
    file: tuple[int, int]

    def __repr__(self) -> str:
        return f"Shard('{self.path}': {self.count:,} ids, {self.dtype.name})"

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.count * self.dtype.itemsize

    def open(self) -> "OpenShard":
        """Returns the shard with a file descriptor, for many reads. Raises HandgradError if the file has changed."""
        return OpenShard(self)

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """Returns `count` ids from `start`, without a count all that follow, (n,) uint16 or uint32. See `OpenShard`."""
        ids = np.empty(self.count - start if count is None else count, self.dtype)
        self.open().read_into(ids, start)
        return ids


class OpenShard:
    """A shard and its file descriptor, which is closed with the last reference to this object.

    Ids are read by pread, not mapped: if the file shrinks or its disk fails, a read raises HandgradError, where an
    access to mapped memory would end the process. A file replaced by renaming stays readable here.
    """

    def __init__(self, shard: Shard):
        self.shard, self.dtype = shard, shard.dtype
        try:
            self._descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
            weakref.finalize(self, os.close, self._descriptor)
            raw = os.pread(self._descriptor, HEADER_BYTES, 0)
        except OSError as error:
            raise HandgradError("data", f"{shard.path} must stay readable during a run", error.strerror) from None
        file, size = _identity(self._descriptor)
        got = "another file" if file != shard.file else ""
        if size != shard.nbytes:
            got = f"{size:,} bytes, {shard.nbytes:,} before"
        if got or _checked(shard.path, raw, size) != (shard.dtype, shard.count):
            raise HandgradError("data", f"{shard.path} must not change during a run", got or "another header")

    def read_into(self, ids: np.ndarray, start: int) -> None:
        """Fills `ids`, (n,) contiguous and of the shard's dtype, with those from `start`.

        Raises HandgradError if the file no longer holds them, or its disk fails.
        """
        at = HEADER_BYTES + start * self.dtype.itemsize
        read = self._pread(ids, at)
        while read < ids.nbytes:  # one read gives at most 2 GiB
            read += self._pread(ids.view(np.uint8)[read:], at + read)

    def _pread(self, into: np.ndarray, at: int) -> int:
        """Reads at byte `at` as much as one call gives, and returns how many bytes that was."""
        path, promised = self.shard.path, self.shard.nbytes
        try:
            if got := os.preadv(self._descriptor, [into.data], at):
                return got
        except OSError as error:
            got_text = f"{error.strerror} at byte {at:,} of {promised:,}"
            raise HandgradError("data", f"{path} must stay readable during a run", got_text) from None
        size = _identity(self._descriptor)[1]
        raise HandgradError("data", f"{path} must not change during a run", f"{size:,} bytes, {promised:,} before")


def open_shard(path: str | Path) -> Shard:
    """Returns the `Shard` at `path` after checking its header against its size, without reading ids.

    Raises HandgradError for a file that is missing, empty, truncated, too long, or of another format or version.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_shard(folder + "/a.bin", [np.array([5, 6, 7])], id_dtype(10)).count
    ...     open_shard(folder + "/a.bin").read(start=1).tolist()
    3
    [6, 7]
    """
    path = Path(path)
    require_file(path, "a token shard", "data")
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            identity, size = _identity(file.fileno())
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None
    return Shard(path, *_checked(path, raw, size), identity)


def open_marks(shard: Shard) -> Shard:
    """Returns the marks beside a shard of chat data, as a `Shard`. Raises HandgradError unless there is one per id."""
    path, hint = shard.path.with_suffix(".mask"), "handgrad data chat makes them; handgrad data check finds damage"
    if not os.path.exists(path):
        raise HandgradError("data", f"{shard.path} must have its marks beside it, {path.name}", "missing", hint=hint)
    marks = open_shard(path)
    if (marks.dtype, marks.count) != (MARK, shard.count):
        got = f"{marks.count:,} of {marks.dtype.name}"
        raise HandgradError("data", f"{path} must hold {shard.count:,} marks, one per id", got, hint=hint)
    return marks


def _identity(descriptor: int) -> tuple[tuple[int, int], int]:
    """Returns ((device, inode), bytes) of an open file."""
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino), found.st_size


def _checked(path: Path, raw: bytes, size: int) -> tuple[np.dtype, int]:
    """Returns (dtype, number of ids) of a file of `size` bytes that begins with `raw`. HandgradError if they differ."""
    if size == 0:
        raise HandgradError("data", f"{path} must hold tokens", "an empty file")
    if len(raw) < HEADER_BYTES:
        raise HandgradError("data", f"{path} must start with a header of {HEADER_BYTES} bytes", f"{size} bytes in all")
    magic, version, low_count = (int(word) for word in np.frombuffer(raw, "<u4", 3))
    if magic not in FORMATS:
        known = " or ".join(str(m) for m, (_, dtype) in FORMATS.items() if dtype != MARK)
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
    return dtype, count


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
    return open_shard(path)


def write_random(path: str | Path, count: int, vocab_size: int, seed: int = 0) -> Shard:
    """Writes and returns a shard of `count` uniformly random ids below `vocab_size`, for benchmarks."""
    rng, dtype = np.random.default_rng(seed), id_dtype(vocab_size)
    return write_shard(path, [rng.integers(0, vocab_size, count)], dtype)
