"""Chats from JSON lines: shards of whole rows, and beside each the marks of the assistant's tokens.

A row is {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": ..., "completion": ...} for a chat of two
messages. Rows are tokenized in order, in one pass: unlike `build`, a killed run begins again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from handgrad.core.disk import require_file, write_text
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.json_file import shown
from handgrad.data.json_lines import json_blocks, json_kind
from handgrad.data.meta import sha256_of
from handgrad.data.prepare.build import Progress, check_replaces, claimed, install
from handgrad.data.prepare.text import paths_of
from handgrad.data.prepare.workers import Encoder
from handgrad.data.shards import BEGINS, MARK, id_dtype, write_shard

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE = "chat_template.jinja"  # in the folder: what made the shards, for who reads them
_Row = tuple[str, list[dict[str, Any]], list[Any] | None]  # its place for errors, messages, tools


class ChatEncoder(Protocol):
    """What chat data need of a template and its tokenizer: `handgrad.tokenizers.ChatEncoder`."""

    name: str
    source: str
    ends: tuple[int, ...]  # the token that ends a turn of the assistant, if there is one

    @property
    def tokens(self) -> Mapping[str, str]: ...  # the special tokens that the template is given, by name

    def encode(self, chats: Sequence[_Row]) -> list[tuple[np.ndarray, np.ndarray]]: ...


@dataclass
class _Split:
    """A split in the making: its shards so far, with the checksums of their files, and the rows of the next one.

    learned: tokens of the assistant's;  held: tokens of the next shard
    """

    name: str
    folder: Path
    dtype: np.dtype
    shards: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    learned: int = 0
    held: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: np.ndarray, mask: np.ndarray) -> None:
        marks = mask.astype(MARK)
        marks[0] |= BEGINS
        self.ids.append(ids)
        self.marks.append(marks)
        self.held += ids.size
        self.rows, self.tokens, self.learned = self.rows + 1, self.tokens + ids.size, self.learned + int(mask.sum())

    def write(self) -> None:
        """Writes the rows as the next shard, if there are any."""
        if not self.ids:
            return
        path = self.folder / f"{self.name}_{len(self.shards):06d}.bin"
        for file, pieces, kind in ((path, self.ids, self.dtype), (path.with_suffix(".mask"), self.marks, MARK)):
            write_shard(file, pieces, kind)
            self.sums[file.name] = sha256_of(file)
        self.shards.append(path.name)
        self.ids, self.marks, self.held = [], [], 0

    def about(self) -> dict[str, Any]:
        """What meta.json says of it."""
        return {"tokens": self.tokens, "assistant": self.learned, "rows": self.rows, "shards": self.shards}


def prepare_chat(
    files: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: Encoder,
    encoder: ChatEncoder,
    *,
    val_fraction: float = 0.05,
    shard_tokens: int = 10_000_000,
    replace: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Writes shards, marks, the template, meta.json and SHA256SUMS of chats into `out_dir`; returns the meta.json.

    files: JSON lines, plain or .gz, .xz or .bz2: one path or several
    tokenizer, encoder: a `handgrad.tokenizers.Tokenizer`, and a `handgrad.tokenizers.ChatEncoder` made with it
    val_fraction: share of the rows that becomes val, evenly spread; at least one unless 0
    shard_tokens: about the tokens of a full shard, which holds whole rows
    replace: the folder's shards of another source, template or tokenizer are replaced
    progress: called with (bytes of the source read, bytes of the source, tokens written)

    The folder changes only when everything is written. Raises HandgradError, which names the line, for a row that is no
    chat, has an unknown role or nothing of the assistant's to learn, or that the template does not take; for a split
    without rows; and as `build` does.
    """
    if not 0 <= val_fraction < 1:
        raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
    if shard_tokens < 1:
        raise HandgradError("data", "shard_tokens must be at least 1", shard_tokens)
    paths, out_dir, dtype = paths_of(files), Path(out_dir), id_dtype(tokenizer.vocab_size)
    try:
        with claimed(out_dir) as building:
            for left in building.iterdir():  # of a run that was killed
                if left.is_file() and left.name != "lock":
                    left.unlink()
            meta: dict[str, Any] = {"tokenizer": tokenizer.save(building), "source": _source(paths, encoder)}
            if not replace:
                check_replaces(out_dir, meta)
            splits = train, val = _Split("train", building, dtype), _Split("val", building, dtype)
            longest = _write(paths, encoder, train, val, val_fraction, shard_tokens, progress)
            write_text(building / TEMPLATE, encoder.source)
            sums = train.sums | val.sums | {TEMPLATE: sha256_of(building / TEMPLATE)}
            meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name}
            about = {"tokens": dict(encoder.tokens), "ends": list(encoder.ends)}
            meta |= {"chat": {"template": encoder.name, "longest": longest} | about}
            meta |= {split.name: split.about() for split in splits}
            install(building, out_dir, meta, sums)
    except OSError as error:
        raise HandgradError("data", f"{out_dir} must be writable", error.strerror) from None
    return meta


def messages_of(row: dict, where: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Returns (messages, tools) of a row. Raises HandgradError if it is no chat.

    >>> messages_of({"prompt": "1 + 1?", "completion": "2"}, "line 1")[0][1]
    {'role': 'assistant', 'content': '2'}
    """
    messages, tools = row.get("messages"), row.get("tools")
    if messages is None and {"prompt", "completion"} <= row.keys():
        pairs = (("user", "prompt"), ("assistant", "completion"))
        messages = [{"role": role, "content": row[key]} for role, key in pairs]
    if not isinstance(messages, list) or not messages:
        got = f"an object with {', '.join(map(shown, row))}" if messages is None else "an empty list"
        got = json_kind(messages) if messages and not isinstance(messages, list) else got
        raise HandgradError("data", f"{where}: a row has a list of messages, or prompt and completion", got)
    if tools is not None and not isinstance(tools, list):
        raise HandgradError("data", f"{where}: tools are a list", json_kind(tools))
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise HandgradError("data", f"{where}: message {number} has a role and a content", json_kind(message))
        if message["role"] not in ROLES:
            rule, word = f"{where}: the role of message {number} is one of {', '.join(ROLES)}", str(message["role"])
            others = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
            raise HandgradError("data", rule, shown(word), hint=did_you_mean(word, ROLES, others))
        if not isinstance(message["content"], str):
            rule = f"{where}: the content of message {number} is a text"
            raise HandgradError("data", rule, json_kind(message["content"]))
    return [{key: value for key, value in message.items() if value is not None} for message in messages], tools


def _write(
    paths: Sequence[Path],
    encoder: ChatEncoder,
    train: _Split,
    val: _Split,
    val_fraction: float,
    shard_tokens: int,
    progress: Progress,
) -> int:
    """Writes all rows; returns the tokens of the longest. Raises HandgradError if a split has none."""
    size, before, total, longest = sum(require_file(path, "a source", "data") for path in paths), 0, 0, 0
    for path in paths:
        for read, rows in json_blocks(path):
            chats = [(where, *messages_of(row, where)) for where, row in rows]
            for (where, *_), (ids, mask) in zip(chats, encoder.encode(chats)):
                if not mask[1:].any():
                    rule = f"{where}: a row must have a token of the assistant's"
                    raise HandgradError("data", rule, f"none of {ids.size}", hint="an empty reply? leave the row out")
                split = val if ceil((total + 1) * val_fraction) > ceil(total * val_fraction) else train
                split.add(ids, mask)
                total, longest = total + 1, max(longest, ids.size)
                if split.held >= shard_tokens:
                    split.write()
            progress(before + read, size, train.tokens + val.tokens)
        before += path.stat().st_size
    for split in (train, val):
        split.write()
    if not total:
        raise HandgradError("data", f"{paths[0]} must hold rows", f"0 in {len(paths)} file{'s' * (len(paths) != 1)}")
    if not train.rows:
        rule = f"val_fraction {val_fraction} must leave rows for train"
        raise HandgradError("data", rule, f"{total} in all", hint="--val-fraction 0 makes no val")
    return longest


def _source(paths: Sequence[Path], encoder: ChatEncoder) -> dict[str, Any]:
    """Returns what meta.json says of the source; it depends on the files' contents, not on their folder."""
    parts = [*map(sha256_of, paths), hashlib.sha256(encoder.source.encode()).hexdigest()]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return {"recipe": "chat", "files": len(paths), "first": paths[0].name, "sha256": digest}
