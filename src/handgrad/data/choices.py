"""Multiple-choice evaluation files in llm.c's format: a header of 256 int32, then examples as uint16 words.

    header[0]  magic 20240522
    header[1]  version 1
    header[2]  number of examples
    header[3]  bytes of the longest example
    header[4:] zero

    example:  65535, bytes of the whole example, index, label, number of endings,
              length and ids of the context, then length and ids of each ending

All little-endian. Lengths, indices and ids are 16-bit words: at most 65,536 examples of under 64 KiB each, and a
vocabulary of at most 65,536. llm.c itself reads only examples with four endings.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from handgrad.core.disk import require_file, write_text, write_whole
from handgrad.core.errors import HandgradError
from handgrad.data.meta import read_json

HEADER_BYTES = 256 * 4
MAGIC, VERSION = 20240522, 1
_START = 65535
_FIXED = 5  # words before the context's length


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question as token ids.

    context: precedes every ending; at least one id
    endings: at least two, none empty
    label: index of the correct ending
    """

    context: list[int]
    endings: list[list[int]]
    label: int


class Vocabulary(Protocol):
    """What a record needs of a tokenizer: `handgrad.tokenizers.Tokenizer`, as far as it is used here."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def bytes_of(self, id: int) -> bytes: ...


def tokens_digest(tokenizer: Vocabulary) -> str:
    """Returns the SHA-256 of the bytes of all tokens, in the order of their ids."""
    digest = hashlib.sha256()
    for id in range(tokenizer.vocab_size):
        token = tokenizer.bytes_of(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def tokens_record(path: str | Path) -> dict | None:
    """Returns what <path>.json records of the tokenizer of the evaluation file `path`, None if there is no record.

    Keys: tokenizer (its name), vocab_size, tokens (`tokens_digest`). Raises HandgradError if damaged.
    """
    beside = Path(f"{path}.json")
    record = read_json(beside, "handgrad data hellaswag and mmlu write it")
    for key, kind in {"tokenizer": str, "vocab_size": int, "tokens": str}.items():
        if record is not None and not isinstance(record.get(key), kind):
            raise HandgradError("data", f"{beside} must hold {key!r} of type {kind.__name__}", "another")
    return record


def write_choices(path: str | Path, items: Iterable[Choices], tokenizer: Vocabulary | None = None) -> int:
    """Writes `items` to the evaluation file `path`, complete or not at all, and returns their number.

    tokenizer: of the ids; recorded in <path>.json (`tokens_record`)

    Raises HandgradError for an item that the format cannot hold, and for no items at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_choices(folder + "/eval.bin", [Choices([1, 2], [[3], [4, 5]], label=1)])
    ...     read_choices(folder + "/eval.bin")
    1
    [Choices(context=[1, 2], endings=[[3], [4, 5]], label=1)]
    """
    examples = [_pack(index, item) for index, item in enumerate(items)]
    if not examples:
        raise HandgradError("data", f"{path} must get at least one example", "none")
    header = np.zeros(256, "<i4")
    header[:4] = MAGIC, VERSION, len(examples), max(len(example) for example in examples)
    record = Path(f"{path}.json")
    with suppress(OSError):  # one that does not go cannot be written beside either, which is reported next
        record.unlink()  # an older file's
    write_whole(path, [header.tobytes(), *examples])
    if tokenizer is not None:
        about = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "tokens": tokens_digest(tokenizer)}
        write_text(record, json.dumps(about, indent=2) + "\n")
    return len(examples)


def read_choices(path: str | Path) -> list[Choices]:
    """Returns the examples of the evaluation file `path`, in file order, after checking every word of it.

    Raises HandgradError for a file that is missing, truncated, too long, inconsistent, or of another format or version.
    """
    path = Path(path)
    require_file(path, "an evaluation file", "data")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise HandgradError("data", f"{path} must be a readable evaluation file", error.strerror) from None
    if len(raw) < HEADER_BYTES:
        raise HandgradError("data", f"{path} must start with a header of {HEADER_BYTES} bytes", f"{len(raw)} in all")
    magic, version, count, longest = np.frombuffer(raw, "<i4", 4).tolist()
    if magic != MAGIC:
        hint = "make one with: handgrad data hellaswag"
        raise HandgradError("data", f"{path} must start with the magic number {MAGIC}", magic, hint=hint)
    if version != VERSION:
        raise HandgradError("data", f"{path} must be version {VERSION}", version)
    if (len(raw) - HEADER_BYTES) % 2:
        raise HandgradError(
            "data", f"{path} must hold whole 16-bit words", f"{len(raw)} bytes", hint="it was truncated"
        )
    if count < 1:
        raise HandgradError("data", f"{path} must hold at least one example", f"a header that counts {count}")
    words = np.frombuffer(raw, "<u2", offset=HEADER_BYTES)
    items, start, found = [], 0, 0
    for index in range(count):
        item, stop = _unpack(words, start, index, path)
        items.append(item)
        found = max(found, 2 * (stop - start))
        start = stop
    if start != len(words):
        rule = f"{path} must end after the {count} examples its header counts"
        raise HandgradError("data", rule, f"{2 * (len(words) - start)} bytes more")
    if longest != found:
        raise HandgradError("data", f"{path}: the longest example must have {longest} bytes as in the header", found)
    return items


def _pack(index: int, item: Choices) -> bytes:
    where = f"example {index}"
    if index >= 2**16:
        raise HandgradError("data", "an evaluation file must hold at most 65,536 examples", "more")
    words = [_START, 0, index, item.label, len(item.endings)]
    for ids in (item.context, *item.endings):
        words += [len(ids), *ids]
    if len(item.endings) < 2 or not 0 <= item.label < len(item.endings):
        rule = f"the label of {where} must be one of its endings, of which there must be two or more"
        raise HandgradError("data", rule, f"label {item.label}, {len(item.endings)} endings")
    if not item.context or not all(item.endings):
        raise HandgradError("data", f"the context and the endings of {where} must hold tokens", "none")
    if 2 * len(words) >= 2**16:
        raise HandgradError("data", f"{where} must take under 65,536 bytes", 2 * len(words))
    for ids in (item.context, *item.endings):
        if min(ids) < 0 or max(ids) >= 2**16:
            bad = next(id for id in ids if not 0 <= id < 2**16)
            hint = "evaluation files hold 16-bit ids: the tokenizer's vocabulary is too large"
            raise HandgradError("data", f"ids of {where} must lie in 0..65535", bad, hint=hint)
    words[1] = 2 * len(words)
    return np.array(words, "<u2").tobytes()


def _unpack(words: np.ndarray, start: int, index: int, path: Path) -> tuple[Choices, int]:
    """Returns (the example that begins at `start`, the index of the next one)."""

    def wrong(rule: str, got: object) -> HandgradError:
        return HandgradError("data", f"{path}, example {index}: {rule}", got)

    if start + _FIXED > len(words):
        raise wrong("the file must hold it", "its end")
    mark, size, number, label, endings = words[start : start + _FIXED].tolist()
    stop = start + size // 2
    if mark != _START:
        raise wrong(f"it must begin with {_START}", mark)
    if size % 2 or stop > len(words):
        raise wrong("its length must be even and inside the file", f"{size} bytes")
    if number != index:
        raise wrong(f"it must be numbered {index}", number)
    if endings < 2 or label >= endings:
        raise wrong("its label must be one of two or more endings", f"label {label}, {endings} endings")
    parts, at = [], start + _FIXED
    for _ in range(1 + endings):
        length = int(words[at]) if at < stop else 0
        if length == 0 or at + 1 + length > stop:
            raise wrong(f"its context and {endings} endings must fit its {size} bytes, none empty", f"length {length}")
        parts.append(words[at + 1 : at + 1 + length].tolist())
        at += 1 + length
    if at != stop:
        raise wrong(f"its parts must fill its {size} bytes", 2 * (at - start))
    return Choices(parts[0], parts[1:], label), stop
