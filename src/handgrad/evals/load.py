"""load_scorer: opens a trained model for scoring; check_tokenizer: whether data are of its tokens."""

from dataclasses import dataclass
from pathlib import Path

from handgrad.backends import open_backend
from handgrad.backends.base import Backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.data import Data, tokens_digest
from handgrad.evals.scoring import Scorer, record
from handgrad.infer.load import Source, check_continues, in_arena, open_source
from handgrad.tokenizers import Tokenizer, load

BATCH_TOKENS = 2048  # at least: enough rows for a GEMM to run near its peak


@dataclass(frozen=True)
class Loaded:
    """source: the model on disk;  dtype: the working one."""

    source: Source
    tokenizer: Tokenizer
    scorer: Scorer
    backend: Backend
    dtype: str


def load_scorer(
    path: str | Path, dtype: str = "saved", backend: str = "auto", threads: int = 0, ema: bool = False
) -> Loaded:
    """The model at a path (whatever `open_source` opens), with its weights in an arena of its own.

    dtype: "f32", "bf16", or "saved" for the one on disk
    ema: with the average of its weights

    Raises HandgradError if something is missing.
    """
    source = open_source(path, ema)
    check_continues(source, "eval")
    tokenizer = source.tokenizer()
    kind = source.weights.dtype if dtype == "saved" else dtype
    opened = open_backend(backend, threads)
    programs = record(source.model, DTYPES[kind], max(BATCH_TOKENS, opened.head_rows))
    arena = in_arena(source, kind, opened, programs)
    return Loaded(source, tokenizer, Scorer(source.model, programs, arena, opened), opened, kind)


def check_tokenizer(data: Data, tokenizer: Tokenizer, owner: str) -> None:
    """Raises HandgradError if the data's meta.json names other tokens than those of `owner`'s tokenizer.

    Data without a meta.json pass: their ids are checked against the vocabulary when they are read.
    """
    if data.meta is None:
        return
    other = load(data.meta["tokenizer"], data.folder)
    if tokens_digest(other) != tokens_digest(tokenizer):
        rule = f"{data.folder} must hold tokens of {described(tokenizer)}, the tokenizer of {owner}"
        raise HandgradError("data", rule, f"those of {described(other)}", context=f"{data.folder}/meta.json says so")


def described(tokenizer: Tokenizer) -> str:
    """A tokenizer in an error message; two of one name differ in size, as a rule."""
    return f"{tokenizer.name} ({tokenizer.vocab_size:,} tokens)"
