"""handgrad data chat and data labels: shards to fine-tune on, from chats and from texts with labels."""

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from handgrad import data, tokenizers
from handgrad.cli.data_shards import Shards, bar
from handgrad.cli.data_tokenizer import Files, MoreFiles, tokenizer_of
from handgrad.core.errors import HandgradError
from handgrad.infer.load import check_continues, open_source
from handgrad.io import newest
from handgrad.models.model import USUAL_SEQ_LEN
from handgrad.train.config import ComputeConfig

OnError = Literal["stop", "skip"]
LEARNED = "⟦", "⟧"  # of --show: around what is learned
FEW = 20  # steps that teach a small set
SHORTEST = 128  # tokens of the --seq-len that is suggested for short rows: several of them fill it well


@dataclass(frozen=True)
class Labelled(Shards):
    """Files with one labelled text per row."""

    files: Files = ()
    """.parquet, .csv, .tsv, .json or JSON lines, with rows such as {"text": "Too long.", "label": "bad"}"""
    val: MoreFiles = ()
    """files that become the validation set, whole"""
    val_fraction: float | None = None
    """share of the texts that becomes the validation set; None: 0.1, without --val"""
    on_error: OnError = "stop"
    """a row without text or label stops it, or is skipped and counted"""
    column: str = "text"
    """the column that holds the text"""
    label: str = "label"
    """the column that holds the label, text or a whole number"""
    pair: str = ""
    """the column that holds a second text, for labels of pairs; empty: there is none"""
    regression: bool = False
    """labels are numbers, which the model learns to predict, by their squared error"""
    seq_len: int = 128
    """tokens of a sequence, [CLS] and [SEP] counted; longer texts are cut"""


@dataclass(frozen=True)
class Chats:
    """Chats to fine-tune a model on: rows with messages, or with a prompt and a completion."""

    files: Files = ()
    """.parquet, .csv, .tsv, .json or JSON lines; all but .parquet may be .gz, .xz, .bz2 or .zst"""
    model: str = ""
    """the model that will learn them, a folder or hf:NAME; or a tokenizer: a folder, a tokenizer.json, gpt2"""
    template: str = ""
    """chatml, gemma, llama3, mistral, qwen2.5, or a Jinja file; empty: the model's own"""
    out: str = "chat"
    """folder for train_*.bin and .mask, val_*.bin and .mask, meta.json and SHA256SUMS"""
    val: MoreFiles = ()
    """files that become the validation set, whole"""
    val_fraction: float | None = None
    """share of the rows, evenly spread, that becomes the validation set; 0: none; None: 0.05, without --val"""
    on_error: OnError = "stop"
    """a row that is no chat to learn stops it, or is skipped and counted"""
    show: int = 0
    """print so many rows as a model learns them, and write nothing"""
    shard_tokens: int = 10_000_000
    """tokens in a full shard"""
    replace: bool = False
    """replace shards of another source, template or tokenizer in the folder"""


def make_labels(a: Labelled, folder: str) -> None:
    """Builds a data set of labelled texts, with a progress bar on a terminal, and prints its size."""
    if not a.files:
        raise HandgradError("data", "labels come from at least one file", "none", hint="handgrad data labels FILE...")
    tokenizer, out = tokenizer_of(a.tokenizer), a.out or folder
    pad = tokenizers.special_ids(tokenizer, ["[PAD]"])
    if pad is None:
        hint = "--tokenizer FOLDER, that of the BERT to start from"
        raise HandgradError("data", "labelled texts take a tokenizer with [PAD]", tokenizer.name, hint=hint)
    names = ("val_fraction", "seq_len", "on_error", "shard_tokens", "workers", "replace", "special_tokens")
    given = {name: getattr(a, name) for name in names}
    given |= {"columns": data.Columns(a.column, a.label, a.pair, a.regression), "val": [Path(f) for f in a.val]}
    with bar() as progress:
        paths = [Path(file) for file in a.files]
        meta = data.prepare_labels(paths, out, tokenizer, pad["[PAD]"], progress=progress, **given)
    for split in ("train", "val"):
        texts = "pairs" if a.pair else "texts"
        print(f"{split:6} {meta[split]['tokens'] // meta['record']:>13,} {texts} of at most {a.seq_len} tokens")
    if "skipped" in meta:
        print(f"rows without text or label, left out: {meta['skipped']:,}")
    if a.regression:
        print(f"labels are {len(meta['values']):,} different numbers, {meta['values'][0]:g} to {meta['values'][-1]:g}")
    else:
        print(f"labels {', '.join(meta['labels'][:20])}{', ...' if len(meta['labels']) > 20 else ''}")
    print(f"train on them: handgrad train --init BERT --train {quote(out)}")


def make_chat(a: Chats) -> None:
    """Builds a data set of chats, with a progress bar on a terminal, and prints its size."""
    if not a.files or not a.model:
        rule, got = "chat comes from at least one file, for a model", "none" if a.model else "no --model"
        raise HandgradError("data", rule, got, hint="handgrad data chat FILE... --model MODEL")
    tokenizer, own, most = model_of(a.model)
    encoder = tokenizers.ChatEncoder(tokenizer, own, a.template)
    if a.show:
        show(a, encoder)
        return
    names = ("val", "val_fraction", "on_error", "shard_tokens", "replace")
    kind: dict[str, Any] = {name: getattr(a, name) for name in names}
    with bar(f"{a.out} is as it was") as progress:
        meta = data.prepare_chat(a.files, a.out, encoder.tokenizer, encoder, progress=progress, **kind)
    for split in ("train", "val"):
        m = meta[split]
        print(f"{split:6} {m['rows']:>11,} rows, {m['tokens']:,} tokens, {m['assistant']:,} of them the assistant's")
    if "skipped" in meta:
        print(f"rows that are no chat to learn, left out: {meta['skipped']:,}")
    print(f"longest row {meta['chat']['longest']:,} tokens; template {encoder.name}; vocabulary {meta['vocab_size']:,}")
    init = "MODEL" if is_tokenizer(a.model) else quote(a.model)
    size = seq_len_for(meta["chat"]["longest"])
    shorter = f" --seq-len {size}" * (size < most)
    length = flags_for(meta["train"]["tokens"], min(size, most))
    print(f"train on it: handgrad train --init {init} --train {quote(a.out)}{shorter} {length}")


def seq_len_for(longest: int) -> int:
    """The power of two, SHORTEST at least, that holds the longest row, whose last token is a target alone.

    >>> seq_len_for(3), seq_len_for(257), seq_len_for(258)
    (128, 256, 512)
    """
    return max(1 << (longest - 2).bit_length(), SHORTEST)


def flags_for(tokens: int, seq_len: int) -> str:
    """The rate and the length that are suggested: three epochs, or FEW small steps at a higher rate for a small set.

    >>> flags_for(10**6, 512)
    '--lr 2e-5 --epochs 3'
    >>> flags_for(2_000, 128)
    '--micro-batch 4 --batch-tokens 512 --lr 1e-4 --epochs 6'
    """
    if 3 * tokens >= FEW * ComputeConfig.micro_batch * seq_len:
        return "--lr 2e-5 --epochs 3"
    batch = 4 * seq_len
    return f"--micro-batch 4 --batch-tokens {batch} --lr 1e-4 --epochs {max(3, -(-FEW * batch // tokens))}"


def show(a: Chats, encoder: tokenizers.ChatEncoder) -> None:
    """Prints the first rows, what is learned of them between marks."""
    if a.show < 0:
        raise HandgradError("data", "--show is at least 0", a.show)
    rows = (row for row in data.read_chats(a.files, encoder, a.on_error) if isinstance(row, data.EncodedRow))
    for row in islice(rows, a.show):
        print(f"{row.where}: {row.ids.size:,} tokens; learned, between {' and '.join(LEARNED)}: {row.mask.sum():,}")
        text = ""
        for learned, ids in row.runs():
            begin, end = LEARNED if learned else ("", "")
            text += begin + encoder.tokenizer.decode(ids) + end
        print(text, end="" if text.endswith("\n") else "\n")


def model_of(word: str) -> tuple[tokenizers.Tokenizer, tokenizers.OwnTemplate, int]:
    """Returns the tokenizer of the model that `word` names, its template, and the usual length of its sequences."""
    if word == "gpt2":
        return tokenizer_of(word), tokenizers.OwnTemplate(word), USUAL_SEQ_LEN
    if is_tokenizer(word):
        folder = Path(word).parent if word.endswith(".json") else Path(word)
        return tokenizer_of(word), tokenizers.template_in_folder(folder), USUAL_SEQ_LEN
    source = open_source(word)
    check_continues(source, "chat")
    return source.tokenizer(), source.template(), source.model.usual_seq_len


def is_tokenizer(word: str) -> bool:
    """Whether a word names a tokenizer, without a model."""
    if word == "gpt2" or word.endswith(".json"):
        return True
    folder = Path(word)
    return (
        os.path.isdir(folder)
        and not (folder / "config.json").exists()
        and newest(folder) is None
        and any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt"))
    )
