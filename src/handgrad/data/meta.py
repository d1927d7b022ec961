"""meta.json: what `handgrad data` records beside shards, and which tokenizer made the shards of several folders."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import MOST_OF_TOKENIZER, read_object
from handgrad.core.number import F32_MAX

META = "meta.json"
VALUE = "value"  # the only label of a regression
MOST_TOKENS = 2**31 - 1  # in a vocabulary: ids are int32 in a batch


def read_meta(folder: str | Path) -> dict | None:
    """Returns the content of the folder's meta.json, or None if it has none (shards that `build` did not write).

    Keys: tokenizer (for `handgrad.tokenizers.load`), vocab_size, dtype, train, val. Raises HandgradError if damaged.
    """
    path = Path(folder) / META
    hint = "make it again: handgrad data RECIPE --replace"
    meta = read_json(path, hint)
    if meta is None:
        return None
    kinds = {"tokenizer": dict, "vocab_size": int, "dtype": str, "train": dict, "val": dict}
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            raise HandgradError("data", f"{path} must hold {key!r} of type {kind.__name__}", "another", hint=hint)
    if not 1 <= meta["vocab_size"] <= MOST_TOKENS:
        rule = f"{path} must hold a 'vocab_size' of 1 to {MOST_TOKENS:,}"
        raise HandgradError("data", rule, meta["vocab_size"], hint=hint)
    for split in ("train", "val"):
        if not isinstance(meta[split].get("tokens", 0), int):
            rule = f"{path} must hold the number of {split} tokens"
            raise HandgradError("data", rule, repr(meta[split]["tokens"]), hint=hint)
    return meta


class Labelled(NamedTuple):
    """What a meta.json says of labelled texts: the labels, the ids of a record, whether it holds a pair of texts, and
    for a regression, whose only label is VALUE, the numbers that records give by their index."""

    labels: tuple[str, ...]
    record: int
    pairs: bool
    values: tuple[float, ...]


def labelled(meta: dict | None, source: object) -> Labelled | None:
    """Returns what a meta.json says of labelled texts; None for other shards.

    Raises HandgradError that names the source if they are damaged.
    """
    labels, record, pairs, values = ((meta or {}).get(key) for key in ("labels", "record", "pairs", "values"))
    if labels is None:
        return None
    if values is None:
        what, found = "two labels or more, each once", labels
        is_whole = _is_list_of((str,), found) and len(set(found)) == len(found) > 1
    else:
        what, found = "numbers as 'values'", values
        is_whole = _is_list_of((int, float), found) and len(found) > 0 and all(abs(one) <= F32_MAX for one in found)
    if not is_whole or type(record) is not int or record < 2:
        rule = f"{source}/{META} must hold {what}, and the ids of a 'record'"
        raise HandgradError("data", rule, "another", hint="make it again: handgrad data labels --replace")
    names = (VALUE,) if values else tuple(labels)
    return Labelled(names, record, pairs is True, tuple(map(float, values or ())))


def _is_list_of(kinds: tuple[type, ...], found: object) -> bool:
    return isinstance(found, list) and all(type(one) in kinds for one in found)


def check_labels(paths: Iterable[Path]) -> None:
    """Raises HandgradError if two folders of these shards have other labels: a record gives its label by an index."""
    (first, known), *others = ((f, labelled(read_meta(f), f)) for f in dict.fromkeys(path.parent for path in paths))
    for folder, other in others:
        if other != known:
            rule = f"one set has the labels of {first / META}"
            raise HandgradError("data", rule, f"others in {folder / META}", hint="a mixture: --train A,B")


def read_json(path: Path, hint: str) -> dict | None:
    """Returns the object in a small JSON file, or None if there is no file. Raises HandgradError for anything else."""
    return read_object(path, "data", MOST_OF_TOKENIZER, hint) if os.path.exists(path) else None


def common_meta(paths: Iterable[Path]) -> tuple[Path, dict] | None:
    """Returns (a folder of these shards, its meta.json), or None if none of their folders has one.

    Raises HandgradError if the meta.json of two folders name different tokenizers, or one folder has none.
    """
    metas = {folder: read_meta(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    described = [folder for folder, meta in metas.items() if meta is not None]
    if not described:
        return None
    first, meta = described[0], metas[described[0]]
    assert meta is not None
    rule = f"shards that are read together must be of one tokenizer, as {first / META} describes it"
    for folder, other in metas.items():
        if other is None:
            raise HandgradError("data", rule, f"{folder}, which has no {META}")
        if folder != first and _identity(folder, other) != _identity(first, meta):
            raise HandgradError("data", rule, f"another in {folder / META}")
    return first, meta


def _identity(folder: Path, meta: dict) -> list:
    """Returns what two folders of one tokenizer have in common: its description, and the content of its file."""
    spec = meta["tokenizer"]
    path = spec.get("path")
    return [spec, meta["vocab_size"], sha256_of(folder / path) if isinstance(path, str) else ""]


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of the file `path` in hexadecimal. Raises HandgradError if it cannot be read."""
    require_file(path, str(path), "data")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HandgradError("data", f"{path} must be readable", error.strerror) from None
