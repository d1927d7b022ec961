"""Denoiser: a masked BERT or a T5 with its objective, whose loss is that of hidden tokens, not of the next one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from handgrad.backends import open_backend
from handgrad.backends.base import Arena, Backend, Executable
from handgrad.core.dtypes import DTYPES, I32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data import Data
from handgrad.evals.metrics import Metric, mean, ratio
from handgrad.evals.scoring import HEAD_ROWS, likeliest, padded
from handgrad.infer.load import Source, in_arena, open_source
from handgrad.models import Bert, Model
from handgrad.tokenizers import Tokenizer

OUTPUTS = ("hidden", "losses", "nsp_losses")  # that `Denoiser.measure` reads


@dataclass(frozen=True)
class Denoiser:
    """source: the model on disk;  dtype: the working one;  batch_size: sequences in a batch.

    The weights are in an arena of its own. Made by `load_denoiser`.
    """

    source: Source
    tokenizer: Tokenizer
    backend: Backend
    dtype: str
    batch_size: int
    loss: Program
    logits: Program
    arena: Arena
    bound: tuple[Executable, Executable]

    def measure(self, batch: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
        """Returns (the sum of all losses of a batch, what belongs to its sequences).

        The second is (sequences, 5) float64: predicted tokens, the sum of their losses, how many are the likeliest
        token, and of pairs of texts the loss times the predicted tokens, and whether the right class is likelier. A
        sequence without predicted tokens is left out.
        """
        run, B, targets = self.bound[0], self.batch_size, batch["targets"]
        for name, t in self.loss.inputs.items():
            self.arena.write(t, batch[name].reshape(-1))
        run.run()
        total = float(self.arena.fetch_scalars(self.loss)().loss_sum)
        read = {name: self.arena.fetch(t) for name, t in self.loss.outputs.items() if name in OUTPUTS}
        found = {name: fetch() for name, fetch in read.items()}
        hits = self._likeliest(found["hidden"]) == targets.ravel()
        columns = [targets.reshape(B, -1) != IGNORE_INDEX, found["losses"].reshape(B, -1), hits.reshape(B, -1)]
        each = np.zeros((B, 5))
        each[:, :3] = np.stack([column.sum(axis=1, dtype=np.float64) for column in columns], axis=1)
        if "nsp_losses" in found:
            each[:, 3] = found["nsp_losses"]
            each[:, 4] = each[:, 3] < each[:, 0] * log(2)  # of two classes, the one above a probability of 1/2
        return total, each[each[:, 0] > 0]

    def _likeliest(self, hidden: np.ndarray) -> np.ndarray:
        """The likeliest token of each row."""
        found = np.zeros(len(hidden), np.int64)
        for at in range(0, len(hidden), HEAD_ROWS):
            part = hidden[at : at + HEAD_ROWS]
            self.arena.write(self.logits.inputs["x"], padded(part))
            self.bound[1].run()
            logits = self.arena.fetch(self.logits.outputs["logits"])()[: len(part)]
            found[at : at + len(part)] = likeliest(logits, self.source.model.vocab_size)
        return found


def load_denoiser(
    path: str | Path,
    seq_len: int,
    batch_size: int,
    dtype: str = "saved",
    backend: str = "auto",
    threads: int = 0,
    ema: bool = False,
) -> Denoiser:
    """The model at a path (whatever `open_source` opens) for sequences of seq_len tokens.

    dtype: "f32", "bf16", or "saved" for the one on disk
    ema: with the average of its weights

    Raises HandgradError if something is missing, or for a BERT without the head of masked tokens.
    """
    source = open_source(path, ema)
    model = source.model
    if isinstance(model, Bert) and not model.mlm:
        hint = "handgrad embed reads it; handgrad data labels and train make a classifier of it"
        raise HandgradError("eval", "a bert has the head of masked tokens, or labels", f"{path} without", hint=hint)
    if seq_len > model.usual_seq_len:
        raise HandgradError("eval", f"a sequence of the model has at most {model.usual_seq_len} tokens", seq_len)
    kind = source.weights.dtype if dtype == "saved" else dtype
    opened = open_backend(backend, threads)
    loss, logits = record(model, DTYPES[kind], seq_len, batch_size, opened)
    arena = in_arena(source, kind, opened, (loss, logits))
    bound = opened.bind(loss, arena), opened.bind(logits, arena)
    return Denoiser(source, source.tokenizer(), opened, kind, batch_size, loss, logits, arena, bound)


def record(model: Model, dtype: DType, seq_len: int, batch_size: int, backend: Backend) -> tuple[Program, Program]:
    """The programs of a batch's losses, as training validates by them, and of the logits of HEAD_ROWS rows."""
    loss, logits = Program(dtype), Program(dtype)
    x = loss.output("hidden", model.body(loss, model.inputs(loss, batch_size, seq_len)))
    most = min(backend.head_rows, backend.head_bytes(dtype) // (model.vocab_padded * dtype.size))
    model.loss(loss, x, loss.input("targets", x.shape[:1], I32), -(-x.shape[0] // max(most, 1)))
    model.logits(logits, logits.input("x", (HEAD_ROWS, x.shape[1]), dtype))
    return loss, logits


def denoising_metrics(
    data: Data, m: Denoiser, limit: int | None = None, done: Callable[[int], None] = lambda sequences: None
) -> dict[str, Metric]:
    """loss: nats per predicted token, as training validates;  acc: how many of these tokens are the likeliest, a share.

    A BERT that also tells whether texts follow each other has the sum of both losses as its loss, and their parts:
    masked_loss, nsp_loss and nsp_acc. Standard errors are over sequences.

    limit: the first `limit` sequences, None for all;  done: called with the number of sequences so far

    Masks and spans depend on the number of a sequence alone, so they are the same in every evaluation.
    """
    total, parts, count = 0.0, list[np.ndarray](), 0
    for batch in data.sweep(m.batch_size, limit and limit * data.seq_len, names=m.loss.inputs):
        loss, each = m.measure(batch)
        total, count = total + loss, count + len(each)
        parts.append(each)
        done(count)
    counts, losses, hits, pairs, right = np.concatenate(parts).T
    found = {"loss": (total / float(counts.sum()), ratio(losses + pairs, counts)[1]), "acc": ratio(hits, counts)}
    if "nsp_losses" in m.loss.outputs:
        found |= {"masked_loss": ratio(losses, counts), "nsp_loss": ratio(pairs, counts), "nsp_acc": mean(right)}
    return found
