"""Engine: text generation with a key/value cache. Prefill reads the prompt in chunks, decode one token at a time."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from handgrad.backends.base import Arena, Backend
from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.infer.sampling import Sampler, Sampling
from handgrad.models import Model, forward_logits
from handgrad.models.model import NONE

PREFILL = 64  # tokens of a prefill chunk: enough rows for a GEMM to run near its peak


def record(model: Model, dtype: DType, context: int = 0, adapters: Mapping[str, Any] = NONE) -> tuple[Program, Program]:
    """The programs (prefill, decode) of one sequence; they share the cache. Prefill has no head.

    context: tokens that the cache holds; 0: the model's usual_seq_len;  adapters: see `Program.adapters`
    """
    prefill, decode = Program(dtype, adapters=adapters), Program(dtype, adapters=adapters)
    context = context or model.usual_seq_len
    model.body(prefill, model.inputs(prefill, 1, min(PREFILL, context), cache=context))
    forward_logits(decode, model, 1, 1, cache=context)
    return prefill, decode


class Engine:
    """Generates with the parameters in an arena that was planned with `record`'s programs.

    context: as given to `record`
    drawable: which ids `generate` may yield, as `Tokenizer.drawable` says; None: all of the model's
    """

    def __init__(
        self,
        model: Model,
        programs: tuple[Program, Program],
        arena: Arena,
        backend: Backend,
        drawable: np.ndarray | None = None,
        context: int = 0,
    ):
        self.model, self.context = model, context or model.usual_seq_len
        self.drawable = drawable
        self._prefill, self._decode = programs
        self._arena = arena
        self._run = tuple(backend.bind(p, arena) for p in programs)
        self.position = 0  # tokens in the cache

    def __repr__(self) -> str:
        return f"Engine({self.model}, {self.position} tokens in the cache)"

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Appends tokens to the cache; returns the logits (V,) f32 after the last one."""
        if len(ids) == 0:
            raise HandgradError("generate", "a prompt has at least one token", "none")
        bad = [t for t in ids if not 0 <= t < self.model.vocab_size]
        if bad:
            raise HandgradError("generate", f"token ids lie below the vocabulary of {self.model.vocab_size}", bad[0])
        if self.position + len(ids) > self.context:
            raise HandgradError("generate", f"the model reads {self.context} tokens", self.position + len(ids))
        ids, chunk = list(ids), self._prefill.inputs["ids"].size
        while len(ids) > 2 and self.position + chunk <= self.context:
            part = ids[: min(chunk, len(ids) - 1)]  # rows past the prompt fill cache rows that later tokens overwrite
            self._step(0, part + [0] * (chunk - len(part)), len(part))
            ids = ids[len(part) :]
        for token in ids:
            self._step(1, [token], 1)
        return self._arena.read(self._decode.outputs["logits"])[0, : self.model.vocab_size].astype(np.float32)

    def _step(self, which: int, ids: list[int], count: int) -> None:
        """Runs prefill (0) or decode (1) and keeps the first `count` of its tokens in the cache."""
        run = self._run[which]
        self._arena.write(run.program.inputs["ids"], ids)
        self._arena.write_scalars(run.program, position=self.position)
        run.run()
        self.position += count

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        drawable: np.ndarray | None = None,
    ) -> Iterator[int]:
        """Yields up to `max_tokens` token ids after `prompt`; ends before any of `stop_ids`. Raises at once.

        drawable: which ids may follow, (n,) bool; None: those of the engine

        The model sees at most `context` tokens. When the window is full, the engine reads its newer half again from
        position 0, so generation has no end of its own. Of a longer prompt it reads the last `context` tokens.
        """
        try:
            ids = [operator.index(t) for t in prompt]
        except TypeError:
            hint = "handgrad.load(path).generate takes text"
            raise HandgradError("generate", "a prompt is a sequence of token ids", repr(prompt), hint=hint) from None
        bad = [t for t in ids if not 0 <= t < self.model.vocab_size]
        if bad:
            raise HandgradError("generate", f"prompt ids lie below the vocabulary of {self.model.vocab_size}", bad[0])
        sampler = Sampler(sampling, self.model.vocab_size, self.drawable if drawable is None else drawable)
        return self._tokens(ids[-self.context :], max_tokens, sampler, stop_ids)

    def _tokens(self, window: list[int], max_tokens: int, sampler: Sampler, stop_ids: Collection[int]) -> Iterator[int]:
        self.position = 0
        logits = self.logits(window)
        for i in range(max_tokens):
            token = sampler.pick(logits)
            if token in stop_ids:
                return
            yield token
            if i + 1 == max_tokens:
                return
            window.append(token)
            if self.position == self.context:
                window = window[-(self.context // 2) or -1 :]
                self.position = 0
                logits = self.logits(window)
            else:
                logits = self.logits([token])
