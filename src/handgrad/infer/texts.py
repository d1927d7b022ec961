"""TextEncoder: whole texts through a BERT, in batches: an embedding of each, or the class that it belongs to."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.backends.base import Arena, Backend, Executable
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object, shown
from handgrad.core.program import Program
from handgrad.core.replace import replace, staged
from handgrad.core.truncate import longest_first
from handgrad.infer.lengths import lengths
from handgrad.infer.load import Source, in_arena, open_source
from handgrad.io.hf import POOLING as POOLING_FILE
from handgrad.models import Bert

BATCH_TOKENS = 512  # at least: enough rows for a GEMM to run near its peak
POOLING = ("auto", "mean", "cls")
Text = str | tuple[str, str]  # one, or a pair
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}  # of sentence-transformers


def special_ids(model: Bert, tokenizer: tokenizers.Tokenizer | None) -> dict[str, int]:
    """Returns the ids of [MASK], [CLS], [SEP] and [PAD]: the tokenizer's own, or the last of the vocabulary."""
    own = None if tokenizer is None else tokenizers.special_ids(tokenizer, model.special_tokens)
    return own or dict(zip(model.special_tokens, range(model.vocab_size - len(model.special_tokens), model.vocab_size)))


def load_encoder(
    path: str | Path,
    dtype: str = "saved",
    backend: str = "auto",
    threads: int = 0,
    context: int = 0,
    ema: bool = False,
    special_tokens: bool = False,
) -> "TextEncoder":
    """The BERT that `open_source` opens, ready to read texts.

    dtype: "f32", "bf16", or "saved" for the one it was trained in
    context: tokens of a text that are read, [CLS] and [SEP] counted; 0: as many as the model reads
    ema: the average of its weights
    special_tokens: a special token spelled out in a text is that token; else it is plain text

    Raises HandgradError for another model, if something is missing, if the model reads fewer tokens, or if its
    tokenizer has no special tokens to read.
    """
    source = open_source(path, ema)
    model = source.model
    if not isinstance(model, Bert):
        hint = f"handgrad generate, for a {model.family}"
        raise HandgradError("model", "a bert reads whole texts", f"a {model.family}", hint=hint)
    if context and not 3 <= context <= model.max_seq_len:
        raise HandgradError("embed", f"context lies in 3 .. {model.max_seq_len} tokens", context)
    kind = source.weights.dtype if dtype == "saved" else dtype
    opened = open_backend(backend, threads)
    steps, most = lengths(context or model.max_seq_len), max(BATCH_TOKENS, opened.head_rows)
    programs = [record(model, Program(DTYPES[kind]), max(most // T, 1), T) for T in steps]
    arena = in_arena(source, kind, opened, programs)
    return TextEncoder(source, model, kind, steps, programs, arena, opened, special_tokens)


def record(model: Bert, p: Program, batch_size: int, seq_len: int) -> Program:
    """A program that reads texts of up to seq_len tokens; its outputs are "hidden" and, with labels, "logits"."""
    data = model.texts(p, batch_size, seq_len, padded=True)
    x = p.output("hidden", model.encode(p, data))
    if model.labels:
        model.logits(p, model.pool(p, x, data))
    return p


@dataclass(frozen=True)
class Class:
    """label: the name of the likeliest class;  probability: its;  logits: of every class, (labels,) float32."""

    label: str
    probability: float
    logits: np.ndarray


class TextEncoder:
    """A BERT with its tokenizer, made by `load_encoder`; it binds each program at first use."""

    def __init__(
        self,
        source: Source,
        model: Bert,
        dtype: str,
        steps: Sequence[int],
        programs: Sequence[Program],
        arena: Arena,
        backend: Backend,
        special_tokens: bool = False,
    ):
        self.source, self.model, self.dtype, self.backend = source, model, dtype, backend
        self.tokenizer, self.labels, self.special_tokens = source.tokenizer(), model.labels, special_tokens
        tokenizers.check_special(self.tokenizer, special_tokens)
        self._special = special_ids(model, self.tokenizer)
        self._lengths, self._programs, self._arena = steps, programs, arena
        self._bound: dict[int, Executable] = {}
        self.context = steps[-1]  # tokens of a text that are read
        self.num_cut = 0  # texts so far that were longer

    def __repr__(self) -> str:
        return f"TextEncoder({self.model}, {self.context} tokens of a text)"

    def read(self, text: Text) -> np.ndarray:
        """Returns ids and types of [CLS] text [SEP], or of [CLS] a [SEP] b [SEP] for a pair, (2, n) int32.

        The end of a text that is too long is cut off; of a pair that of the longer text.
        """
        cls, sep = self._special["[CLS]"], self._special["[SEP]"]
        texts = (text,) if isinstance(text, str) else text
        parts = [self.tokenizer.encode(part, self.special_tokens) for part in texts]
        parts = [ids[ids != self._special["[PAD]"]] for ids in parts]  # as in data: it would end the text
        sizes, most = [len(part) for part in parts], self.context - 1 - len(parts)
        kept = [min(sizes[0], most)] if len(parts) == 1 else longest_first(sizes[0], sizes[1], most)
        self.num_cut += sum(sizes) > most
        found = [np.array([[cls], [0]])]
        for kind, (part, size) in enumerate(zip(parts, kept)):
            found.append(np.stack([np.append(part[:size], sep), np.full(size + 1, kind)]))
        return np.concatenate(found, axis=1).astype(np.int32)

    def embed(self, texts: Sequence[str], pooling: str = "auto", normalize: bool = True) -> np.ndarray:
        """Returns an embedding of each text, (texts, hidden size) float32.

        pooling: "mean" of the last layer over a text's tokens, [CLS] and [SEP] included, or "cls", its first row;
            "auto": what sentence-transformers' files beside the model say, else the mean
        normalize: give them length 1, so that a dot product is a cosine

        Raises HandgradError for another pooling, and for a text that the tokenizer cannot spell.
        """
        if pooling not in POOLING:
            raise HandgradError("embed", f"pooling is {' or '.join(POOLING)}", repr(pooling))
        pooling = own_pooling(self.source.path) if pooling == "auto" else pooling
        found = np.zeros((len(texts), self.model.hidden_size), np.float32)
        for i, hidden in self._outputs("hidden", [self.read(text) for text in texts]):
            found[i] = hidden.mean(axis=0, dtype=np.float32) if pooling == "mean" else hidden[0]
        if normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return found

    def classify(self, texts: Sequence[Text]) -> list[Class]:
        """Returns the class of each text, or pair of texts. Raises HandgradError as `logits`, and for a regression."""
        if self.model.is_regression:
            raise HandgradError("classify", "a classifier has two labels or more", "a regression", hint="logits(texts)")
        found = []
        for logits in self.logits(texts):
            best = int(logits.argmax())
            share = 1.0 / np.exp(logits.astype(np.float64) - float(logits[best])).sum()
            found.append(Class(self.labels[best], float(share), logits))
        return found

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """Returns the logits of each text, or pair of texts, (texts, labels) float32; of a regression the number that
        it predicts, (texts, 1).

        Raises HandgradError for a model without labels, and for pairs if it has one type of tokens alone.
        """
        if self.model.num_types < 2 and not all(isinstance(text, str) for text in texts):
            raise HandgradError("classify", "pairs of texts take a bert with two types of tokens", self.model.num_types)
        return self.logits_of([self.read(text) for text in texts])

    def logits_of(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """As `logits`, for ids and types as `read` returns them."""
        if not self.labels:
            hint = "handgrad data labels FILE, then handgrad train --init MODEL --train FOLDER"
            raise HandgradError("classify", "a classifier has labels", "a bert without", hint=hint)
        found = np.zeros((len(texts), len(self.labels)), np.float32)
        for i, logits in self._outputs("logits", texts):
            found[i] = logits
        return found

    def _outputs(self, output: str, texts: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the text (2, n), its rows of "hidden" or its row of "logits", float32), longest first.

        The next batch starts before the host waits for the previous one.
        """
        sizes, waiting, at = [text.shape[1] for text in texts], list[tuple[Any, ...]](), 0
        order = sorted(range(len(texts)), key=lambda i: -sizes[i])
        while at < len(order) or waiting:
            if at < len(order):
                which = bisect_left(self._lengths, sizes[order[at]])
                group = order[at : at + self._programs[which].inputs["ids"].size // self._lengths[which]]
                at += len(group)
                waiting.append((group, self._start(which, output, [texts[i] for i in group])))
            if len(waiting) == 2 or at >= len(order):
                group, read = waiting.pop(0)
                values = read()
                for row, i in enumerate(group):
                    yield i, values[row][: sizes[i]] if output == "hidden" else values[row]

    def _start(self, which: int, output: str, texts: Sequence[np.ndarray]) -> Any:
        """Starts a batch; calling the result waits for the output, float32, by texts."""
        program, T = self._programs[which], self._lengths[which]
        if which not in self._bound:
            self._bound[which] = self.backend.bind(program, self._arena)
        B = program.inputs["ids"].size // T
        ids, count = np.full((B, T), self._special["[PAD]"], np.int32), np.zeros((B, 1), np.int32)
        types = np.zeros_like(ids)
        for row, text in enumerate(texts):
            count[row] = text.shape[1]
            ids[row, : text.shape[1]], types[row, : text.shape[1]] = text
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:  # a kernel would read past the embedding
            rule = f"{self.source.path} has a tokenizer of its own {self.model.vocab_size} tokens"
            raise HandgradError("embed", rule, f"the id {ids.max()}")
        inputs = bounds(ids, count) | {"ids": ids, "types": types}
        for name, values in inputs.items():
            self._arena.write(program.inputs[name], values.reshape(-1))
        self._bound[which].run()
        fetched, shape = self._arena.fetch(program.outputs[output]), (B, T, -1) if output == "hidden" else (B, -1)
        return lambda: fetched().astype(np.float32).reshape(shape)


def own_pooling(folder: Path) -> str:
    """Returns the pooling that sentence-transformers' files in a folder name; "mean" without such files.

    Raises HandgradError if they name another, or several.
    """
    path = folder / POOLING_FILE
    if not path.is_file():
        return "mean"
    modes = [key for key, value in read_object(path, "embed").items() if key.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in MODES:
        got = shown(", ".join(modes) or "none")
        raise HandgradError("embed", f"{path} has one of {', '.join(MODES)}", got, hint="--pooling says which")
    return MODES[modes[0]]


def write_array(path: Path, parts: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Writes arrays, one below the other, as a .npy file, and returns its shape. An older file stays until the new one
    is on disk. Raises HandgradError if it cannot be written."""
    values = np.concatenate(parts)
    try:
        with staged(path) as new:
            with new.open("wb") as file:
                np.save(file, values)
            replace(new, path)
    except OSError as error:
        raise HandgradError("embed", f"'{path}' can be written", error.strerror) from None
    return values.shape


def bounds(ids: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `first` and `last` (B, T): a token sees the count (B, 1) tokens of its text, padding sees nothing."""
    here = np.arange(ids.shape[1], dtype=np.int32)
    return {
        "first": np.where(here < count, np.int32(0), count),
        "last": np.repeat(count - np.int32(1), ids.shape[1], axis=1),
    }
