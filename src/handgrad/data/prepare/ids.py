"""Files of token ids that others wrote: .npy, or no header at all, as nanoGPT's train.bin."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.data.prepare.bounds import readable
from handgrad.data.prepare.workers import Job
from handgrad.data.shards import FORMATS

BLOCK_IDS = 2**20
RAW = ("uint16", "uint32")


def token_ids(path: Path, raw: str | None, vocab_size: int) -> Iterator[tuple[int, Job]]:
    """A file of ids: a .npy with one dimension, or ids alone of the dtype `raw`, little-endian.

    Each id must be below vocab_size: of a file without a header, another dtype shows in most cases by its ids.
    """
    dtype, at, count = _layout(path, raw)
    for start in range(0, count, BLOCK_IDS):
        stop = min(start + BLOCK_IDS, count)
        yield at + stop * dtype.itemsize, Job(_ids_between, (path, dtype, at, start, stop, vocab_size))


def _layout(path: Path, raw: str | None) -> tuple[np.dtype, int, int]:
    """Returns (dtype, place of the first id in the file, number of ids)."""
    size = require_file(path, "a file of ids", "data")
    if path.suffix == ".npy":
        if raw:
            raise HandgradError("data", "--raw is for files without a header", str(path), hint="leave it out for .npy")
        with readable(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "ui":
            shape = "x".join(map(str, array.shape))
            raise HandgradError("data", f"{path} must hold ids in one dimension", f"{array.dtype.name} of {shape}")
        return array.dtype, array.offset, array.size
    if not raw:
        hint = "--raw uint16 for nanoGPT's train.bin"
        raise HandgradError("data", "a file of ids is a .npy, or --raw says what its ids are", str(path), hint=hint)
    with readable(path), path.open("rb") as file:
        first = int.from_bytes(file.read(4), "little")
    if first in FORMATS:
        hint = f"handgrad train --train {path} reads it as it is"
        raise HandgradError("data", "--raw is for files without a header", f"the token shard {path}", hint=hint)
    dtype = np.dtype(raw).newbyteorder("<")
    if size % dtype.itemsize:
        raise HandgradError("data", f"{path} must hold whole ids of {dtype.itemsize} bytes", f"{size:,} bytes")
    return dtype, 0, size // dtype.itemsize


def _ids_between(path: Path, dtype: np.dtype, at: int, start: int, stop: int, vocab_size: int) -> Iterator[np.ndarray]:
    with readable(path):
        ids = np.fromfile(path, dtype, stop - start, offset=at + start * dtype.itemsize)
    if len(ids) < stop - start:
        raise HandgradError("data", f"{path} must not shrink while it is read", f"{start + len(ids):,} ids")
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        place = int(wrong.argmax())
        hint = "--tokenizer names the one that made the ids, and --raw their dtype"
        rule = f"{path} must hold ids below the vocabulary size {vocab_size:,}"
        raise HandgradError("data", rule, f"{int(ids[place])} at id {start + place:,}", hint=hint)
    yield ids
