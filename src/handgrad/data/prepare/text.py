"""From text files to train and val shards, in bounded memory, however long the text.

Each file is a document, preceded by the tokenizer's end-of-text id where it has one, as in llm.c's shards. The tail of
the text is for validation. Files are read 256 KiB at a time and cut where a space or line break follows another
character. GPT-2's pattern always parts words there, so its ids are those of the text in one piece; another tokenizer
may choose otherwise at such a cut.

Peak memory beyond the tokenizer's own: 10 MB with characters or GPT-2, 110 MB with a tokenizer.json.
"""

import codecs
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.shards import Shard, id_dtype, write_shard

PIECE_BYTES = 2**18
_CUT = re.compile(r"\S(?=[ \n])")
_LONGEST_WORD = 4096  # characters; text without a space for so long is cut anywhere
_OURS = re.compile(r"(train|val)_\d{6}\.bin")


def prepare_text(
    files: Sequence[str | Path],
    out_dir: str | Path,
    tokenizer,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
) -> dict:
    """Writes `files` as train_000000.bin.., val_000000.bin.. and meta.json into `out_dir`; returns meta.json's content.

    tokenizer: a `handgrad.tokenizers.Tokenizer`; ids are uint16 if its vocabulary allows, else uint32
    val_fraction: share of the text's bytes, at its end, that becomes val; 0 makes no val shard
    shard_tokens: tokens in a full shard

    The folder changes only when all is written; then it holds these shards and no older ones of the same names.
    Raises HandgradError for a file that is missing or not UTF-8, for a split without text, for a full disk.

    >>> import tempfile
    >>> from handgrad import tokenizers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = Path(folder, "a.txt")
    ...     _ = text.write_text("to be or not to be")
    ...     meta = prepare_text([text], folder, tokenizers.chars(text.read_text()), val_fraction=0.5)
    ...     meta["vocab_size"], meta["train"]
    (7, {'tokens': 9, 'bytes': 9, 'shards': ['train_000000.bin']})
    """
    if not 0 <= val_fraction < 1:
        raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
    if shard_tokens < 1:
        raise HandgradError("data", "shard_tokens must be at least 1", shard_tokens)
    out_dir = Path(out_dir)
    spans = _split([Path(file) for file in files], val_fraction)
    building = out_dir / ".preparing"
    is_new = not out_dir.exists()
    try:
        shutil.rmtree(building, ignore_errors=True)  # of an attempt that was killed
        building.mkdir(parents=True)
        meta = {
            "tokenizer": tokenizer.save(building),
            "vocab_size": tokenizer.vocab_size,
            "dtype": id_dtype(tokenizer.vocab_size).name,
        }
        for split, parts in spans.items():
            shards = _write(building, split, _ids(parts, tokenizer), meta["dtype"], shard_tokens)
            count = sum(shard.count for shard in shards)
            if count == 0 and (split == "train" or val_fraction > 0):
                raise HandgradError("data", f"the {split} part of the text must hold tokens", "none")
            size = sum(stop - start for _, start, stop in parts)
            meta[split] = {"tokens": count, "bytes": size, "shards": [shard.path.name for shard in shards]}
        (building / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _install(building, out_dir)
    except OSError as error:
        raise HandgradError("data", f"{out_dir} must be writable", error.strerror) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if is_new and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return meta


def read_meta(folder: str | Path) -> dict | None:
    """Returns what `prepare_text` noted in the folder's meta.json, or None if there is none (shards from elsewhere).

    Keys: tokenizer (for `handgrad.tokenizers.load`), vocab_size, dtype, train, val. Raises HandgradError if damaged.
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    hint = "make it again with: handgrad data text FILE"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HandgradError("data", f"{path} must be JSON", error, hint=hint) from None
    kinds = {"tokenizer": dict, "vocab_size": int, "dtype": str, "train": dict, "val": dict}
    for key, kind in kinds.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise HandgradError("data", f"{path} must hold {key!r} of type {kind.__name__}", "another", hint=hint)
    return meta


def read_text(files: Iterable[str | Path]) -> Iterator[str]:
    """Yields the text of `files` in pieces of up to 256 KiB. Raises HandgradError if one is missing or not UTF-8.

    >>> sum(len(piece) for piece in read_text([shakespeare()]))
    1123762
    """
    for file in files:
        path = Path(file)
        yield from _read(path, 0, _size(path))


def shakespeare() -> Path:
    """Returns where the packaged text lies: 40,000 lines from nine plays by Shakespeare, 64 different characters."""
    return Path(__file__).parent.parent / "shakespeare.txt"


def _size(path: Path) -> int:
    if not path.is_file():
        found = "which is no file" if path.exists() else "which is missing"
        raise HandgradError("data", "a text must be a file", f"{path}, {found}")
    return path.stat().st_size


def _split(files: list[Path], val_fraction: float) -> dict[str, list[tuple[Path, int, int]]]:
    """Returns the byte ranges (file, start, stop) of train and of val, parted between two characters."""
    sizes = [_size(path) for path in files]
    left = int(sum(sizes) * (1 - val_fraction))
    if sum(sizes) == 0:
        raise HandgradError("data", "the text must not be empty", f"0 bytes in {len(files)} files")
    train, val = [], []
    for path, size in zip(files, sizes, strict=True):
        cut = min(left, size)
        left -= cut
        if 0 < cut < size:
            with path.open("rb") as file:
                file.seek(cut)
                cut += sum(1 for _ in _continuation(file.read(3)))
        if cut > 0:
            train.append((path, 0, cut))
        if cut < size:
            val.append((path, cut, size))
    return {"train": train, "val": val}


def _continuation(raw: bytes) -> Iterator[int]:
    """Yields the leading bytes of `raw` that belong to a character begun before it."""
    for byte in raw:
        if byte >> 6 != 0b10:
            return
        yield byte


def _read(path: Path, start: int, stop: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    tail = ""
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                raw = file.read(min(PIECE_BYTES, stop - start))
                if not raw:
                    raise HandgradError("data", f"{path} must not shrink while it is read", f"{start} bytes")
                begin = start - len(decoder.getstate()[0])
                start += len(raw)
                try:
                    text = tail + decoder.decode(raw, final=start == stop)
                except UnicodeDecodeError as error:
                    where = f"byte 0x{error.object[error.start]:02x} at offset {begin + error.start}"
                    raise HandgradError("data", f"{path} must be UTF-8 text", where) from None
                cut = len(text) if start == stop else _cut(text)
                yield text[:cut]
                tail = text[cut:]
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None


def _cut(text: str) -> int:
    places = [match.end() for match in _CUT.finditer(text, max(len(text) - _LONGEST_WORD, 0))]
    return places[-1] if places else len(text)


def _ids(parts: list[tuple[Path, int, int]], tokenizer) -> Iterator[np.ndarray]:
    for path, start, stop in parts:
        if start == 0 and tokenizer.eot is not None:
            yield np.array([tokenizer.eot])
        for text in _read(path, start, stop):
            yield tokenizer.encode(text)


def _write(folder: Path, split: str, pieces: Iterator[np.ndarray], dtype: str, shard_tokens: int) -> list[Shard]:
    def numbered():
        total = 0
        for ids in pieces:
            while len(ids):
                room = shard_tokens - total % shard_tokens
                yield total // shard_tokens, ids[:room]
                total += len(ids[:room])
                ids = ids[room:]

    return [
        write_shard(folder / f"{split}_{index:06d}.bin", (ids for _, ids in group), np.dtype(dtype))
        for index, group in groupby(numbered(), key=lambda pair: pair[0])
    ]


def _install(building: Path, out_dir: Path) -> None:
    """Moves the new files over the old; meta.json goes first and comes last, so that it never describes a mixture."""
    (out_dir / "meta.json").unlink(missing_ok=True)
    for old in out_dir.iterdir():
        if _OURS.fullmatch(old.name):
            old.unlink()
    names = sorted(path.name for path in building.iterdir() if path.name != "meta.json")
    for name in [*names, "meta.json"]:
        (building / name).replace(out_dir / name)
