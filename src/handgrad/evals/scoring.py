"""Scorer: the losses of continuations after their contexts.

Texts are batched by length, so short ones are not padded to long ones. Each of a few lengths has a program, with so
many sequences that all batches have about the same number of tokens. Padding is on the right, where causal attention
never looks. The head, most of a small model's work, runs only on rows that predict a continuation, HEAD_ROWS of them at
a time.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from handgrad.backends.base import Arena, Backend, Executable
from handgrad.core.dtypes import I32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.infer.lengths import lengths
from handgrad.models import Model
from handgrad.models.model import NONE

LOSSES, LOGITS = -2, -1  # where the head's programs stand among them
HEAD_ROWS = 512  # 100 MB of logits at GPT-2's vocabulary in float32

Ids = Sequence[int] | np.ndarray  # token ids
Pair = tuple[Ids, Ids]  # context, continuation


@dataclass(frozen=True)
class Score:
    """losses: (n,) float32, nats per token of a continuation;  greedy: each is the likeliest; None: not computed."""

    losses: np.ndarray
    greedy: bool | None


def record(model: Model, dtype: DType, tokens: int, adapters: Mapping[str, Any] = NONE) -> tuple[Program, ...]:
    """The programs of a Scorer: one per length, of about `tokens` tokens a batch; then the head's losses and logits.

    adapters: see `Program.adapters`

    None of them uses every parameter, so the plan's primary program must be another: `models.declare`'s, or training's.
    """
    bodies = []
    for length in lengths(model.usual_seq_len):
        p = Program(dtype, adapters=adapters)
        p.output("hidden", model.body(p, model.inputs(p, max(tokens // length, 1), length)))
        bodies.append(p)
    width = bodies[0].outputs["hidden"].shape[1]
    losses, logits = heads = Program(dtype), Program(dtype)  # on rows that the host picks
    for p in heads:
        p.input("x", (HEAD_ROWS, width), dtype)
    model.loss(losses, losses.inputs["x"], losses.input("targets", (HEAD_ROWS,), I32))
    model.logits(logits, logits.inputs["x"])
    return *bodies, losses, logits


class Scorer:
    """Scores with the parameters in an arena that was planned with `record`'s programs; binds each at first use."""

    def __init__(self, model: Model, programs: tuple[Program, ...], arena: Arena, backend: Backend):
        self.model = model
        self._programs, self._arena, self._backend = programs, arena, backend
        self._lengths = lengths(model.usual_seq_len)
        self._bound: dict[int, Executable] = {}

    def score(
        self, pairs: Sequence[Pair], *, greedy: bool = False, done: Callable[[int], None] = lambda count: None
    ) -> list[Score]:
        """The scores of (context, continuation) pairs of token ids, in their order.

        greedy: also find out whether greedy decoding writes the continuation
        done: called now and then with the number of pairs scored so far

        Raises HandgradError as `texts` does.
        """
        texts = self.texts(pairs)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
        ends = np.cumsum([len(texts[i][1]) for i in order])
        losses, hits, count = [], [], 0
        for x, targets in _pieces(self._rows([texts[i] for i in order])):
            nats, hit = self._judge(x, targets, greedy)
            losses.append(nats)
            hits.append(hit)
            count += len(targets)
            done(int(np.searchsorted(ends, count, "right")))
        scores: dict[int, Score] = {}
        if texts:
            parts = (np.split(np.concatenate(found), ends[:-1]) for found in (losses, hits))
            for i, nats, hit in zip(order, *parts, strict=True):
                scores[i] = Score(nats, bool(hit.all()) if greedy else None)
        return [scores[i] for i in range(len(texts))]

    def texts(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(the tokens that the model reads, the targets of the last of them), both int32, of every pair.

        A context that does not fit is truncated on the left. Raises HandgradError for a pair with an empty part, a
        continuation longer than the model reads, and an id outside the vocabulary.
        """
        return [self._text(*pair) for pair in pairs]

    def _text(self, context: Ids, continuation: Ids) -> tuple[np.ndarray, np.ndarray]:
        T = self.model.usual_seq_len
        if len(context) == 0 or len(continuation) == 0:
            raise HandgradError("eval", "a context and a continuation hold at least one token", "an empty one")
        if len(continuation) > T:
            rule = f"a continuation is at most as long as the {T} tokens that the model reads"
            raise HandgradError("eval", rule, len(continuation), hint="a model with a larger max_seq_len")
        ids = np.concatenate([context, continuation]).astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.model.vocab_size)][0]
            hint = "the task was made with another tokenizer than the model's"
            raise HandgradError("eval", f"ids lie below the vocabulary of {self.model.vocab_size}", bad, hint=hint)
        ids = ids[-(T + 1) :].astype(np.int32)
        return ids[:-1], ids[-len(continuation) :]

    def _rows(self, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each of the texts, longest first: the rows (n, C) that the head reads, and their n targets.

        The next batch starts before the host waits for the previous one.
        """
        waiting: list[tuple] = []
        at = 0
        while at < len(texts) or waiting:
            if at < len(texts):
                body = bisect_left(self._lengths, len(texts[at][0]))
                T = self._lengths[body]
                B = self._programs[body].inputs["ids"].size // T
                group = texts[at : at + B]
                at += B
                table = np.zeros((B, T), np.int32)
                for row, (text, _) in enumerate(group):
                    table[row, : len(text)] = text
                waiting.append((group, T, self._start(body, "hidden", ids=table.reshape(-1))))
            if len(waiting) == 2 or at >= len(texts):
                group, T, read = waiting.pop(0)
                hidden = read()
                for row, (text, targets) in enumerate(group):
                    last = row * T + len(text)
                    yield hidden[last - len(targets) : last], targets

    def _judge(self, x: np.ndarray, targets: np.ndarray, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
        """(losses, whether the target is the likeliest token) of up to HEAD_ROWS rows; all False unless `greedy`."""
        count, rows = len(targets), padded(x)
        losses = self._start(LOSSES, "losses", x=rows, targets=padded(targets, IGNORE_INDEX))()[:count]
        hits = np.zeros(count, bool)
        if greedy:
            hits = likeliest(self._start(LOGITS, "logits", x=rows)()[:count], self.model.vocab_size) == targets
        return losses.astype(np.float32), hits

    def _start(self, which: int, output: str, **inputs: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts a program on these inputs, and binds it at first use; calling the result waits for the output."""
        program = self._programs[which]
        if which not in self._bound:
            self._bound[which] = self._backend.bind(program, self._arena)
        for name, values in inputs.items():
            self._arena.write(program.inputs[name], values)
        self._bound[which].run()
        return self._arena.fetch(program.outputs[output])


def padded(rows: np.ndarray, value: int = 0) -> np.ndarray:
    """Returns up to HEAD_ROWS rows, and rows of `value` after them: as many as a program of the head reads."""
    found = np.full((HEAD_ROWS, *rows.shape[1:]), value, rows.dtype)
    found[: len(rows)] = rows
    return found


def likeliest(logits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns the likeliest token (n) of each row of logits (n, padded vocabulary)."""
    return logits[:, :vocab_size].astype(np.float32).argmax(axis=1)


def _pieces(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows and targets in pieces of HEAD_ROWS."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for part in rows:
        held.append(part)
        count += len(part[1])
        while count >= HEAD_ROWS:
            x, targets = map(np.concatenate, zip(*held))
            yield x[:HEAD_ROWS], targets[:HEAD_ROWS]
            held, count = [(x[HEAD_ROWS:], targets[HEAD_ROWS:])], count - HEAD_ROWS
    if count:
        x, targets = map(np.concatenate, zip(*held))
        yield x, targets
