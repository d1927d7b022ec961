"""Engine: text generation with a key/value cache. Prefill reads the prompt in chunks, decode one token at a time. The
prompt of an encoder-decoder is the source: its encoder reads it whole, and the decoder starts with an id of its own."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from handgrad.backends.base import Arena, Backend
from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.infer.sampling import Sampler, Sampling
from handgrad.models import EncoderDecoder, Model, forward_logits
from handgrad.models.model import NONE

PREFILL = 64  # tokens of a prefill chunk: enough rows for a GEMM to run near its peak


def record(model: Model, dtype: DType, context: int = 0, adapters: Mapping[str, Any] = NONE) -> tuple[Program, ...]:
    """The programs (prefill, decode) of one sequence; they share the cache. Prefill has no head. For an encoder-decoder
    (prefill, decode, encode): the first two read what the third one writes.

    context: tokens that the cache holds; 0: `usual_context`;  adapters: see `Program.adapters`
    """
    prefill, decode, encode = (Program(dtype, adapters=adapters) for _ in range(3))
    context = context or usual_context(model)
    model.body(prefill, model.inputs(prefill, 1, min(PREFILL, context), cache=context))
    forward_logits(decode, model, 1, 1, cache=context)
    if not isinstance(model, EncoderDecoder):
        return prefill, decode
    model.encode(encode, 1)
    return prefill, decode, encode


def usual_context(model: Model) -> int:
    """Tokens in the cache where the user does not say: the model's usual_seq_len. What a decoder writes may be longer
    than its targets in training."""
    return model.max_seq_len if isinstance(model, EncoderDecoder) else model.usual_seq_len


class Engine:
    """Generates with the parameters in an arena that was planned with `record`'s programs.

    context: as given to `record`
    drawable: which ids `generate` may yield, as `Tokenizer.drawable` says; None: all of the model's
    """

    def __init__(
        self,
        model: Model,
        programs: tuple[Program, ...],
        arena: Arena,
        backend: Backend,
        drawable: np.ndarray | None = None,
        context: int = 0,
    ):
        self.model, self.context = model, context or usual_context(model)
        self.drawable = drawable
        self._prefill, self._decode = programs[:2]
        self._arena = arena
        self._run = tuple(backend.bind(p, arena) for p in programs)
        self.position = 0  # tokens in the cache
        self._held: list[int] = []  # which tokens these are, and those that still lie behind them

    def __repr__(self) -> str:
        return f"Engine({self.model}, {self.position} tokens in the cache)"

    def read(self, source: Sequence[int]) -> None:
        """Encodes a source for an encoder-decoder, and empties the cache."""
        padding = [0] * (self.model.max_seq_len - len(source))
        for run in self._run:
            last = run.program.inputs["source_last"]
            self._arena.write(last, [len(source) - 1] * last.size)
        encode = self._run[2]
        self._arena.write(encode.program.inputs["source"], [*source, *padding])
        encode.run()
        self.position = 0
        self._held.clear()

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
        return self._arena.read(self._decode.outputs["logits"])[0, : self.model.vocab_size].astype(
            np.float32, copy=False
        )

    def _step(self, which: int, ids: list[int], count: int) -> None:
        """Runs prefill (0) or decode (1) and keeps the first `count` of its tokens in the cache."""
        run = self._run[which]
        del self._held[self.position :]  # before the rows change: Ctrl-C may come in between
        self._arena.write(run.program.inputs["ids"], ids)
        self._arena.write_scalars(run.program, position=self.position)
        run.run()
        self._held += ids[:count]
        self.position += count

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        drawable: np.ndarray | None = None,
        reuse: bool = False,
    ) -> Iterator[int]:
        """Yields up to `max_tokens` token ids after `prompt` (of an encoder-decoder: about it, its source); ends before
        any of `stop_ids`. Raises at once.

        drawable: which ids may follow, (n,) bool; None: those of the engine
        reuse: keep the rows of the cache that hold the beginning of this prompt. Another rounding wrote them, perhaps,
            so the same prompt may get another text where two tokens are about as likely

        The model sees at most `context` tokens. When the window is full, the engine reads its newer half again from
        position 0, so generation has no end of its own. Of a longer prompt it reads the last `context` tokens; a source
        has at most max_seq_len.
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
        if not isinstance(self.model, EncoderDecoder):
            return self._tokens(None, ids[-self.context :], max_tokens, sampler, stop_ids, reuse)
        if not 0 < len(ids) <= self.model.max_seq_len:
            rule = f"a source has 1 to {self.model.max_seq_len} tokens, its end included"
            raise HandgradError("generate", rule, len(ids))
        return self._tokens(ids, [self.model.start_id], max_tokens, sampler, stop_ids, False)

    def _num_shared(self, ids: list[int]) -> int:
        """How many of these tokens the cache holds, without the last one, whose logits are wanted."""
        pairs = zip(ids[:-1], self._held)
        return next((n for n, (wanted, held) in enumerate(pairs) if wanted != held), min(len(ids) - 1, len(self._held)))

    def _tokens(
        self,
        source: list[int] | None,
        window: list[int],
        max_tokens: int,
        sampler: Sampler,
        stop_ids: Collection[int],
        reuse: bool,
    ) -> Iterator[int]:
        if source is not None:
            self.read(source)
        self.position = self._num_shared(window) if reuse else 0
        logits = self.logits(window[self.position :])
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
