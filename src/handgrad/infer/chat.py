"""Chat: a conversation with a model. Its messages become ids by a template, and what does not fit in the model's window
is dropped, the oldest turns first."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.infer.load import MAX_TOKENS, Loaded, Source, check_continues
from handgrad.infer.sampling import Sampling
from handgrad.tokenizers import ChatEncoder

ROOM = 4  # a reply has at least this part of the window, or max_tokens if these are fewer


def encoder_of(source: Source, template: str = "", system: str = "") -> ChatEncoder:
    """The encoder of chats with a model, which need not be loaded.

    template: one of handgrad.tokenizers.TEMPLATES, or a file; empty: the model's own

    Raises HandgradError for a model that continues no texts or has no template, for a template that is not there or
    does not go with the model's tokenizer, and for one that takes no such system message, or no message of the user's.
    """
    check_continues(source, "chat")
    encoder = ChatEncoder(source.tokenizer(), source.template(), template)
    if system:
        encoder.check_system(system)
    else:
        encoder.prompt([{"role": "user", "content": "a"}])
    return encoder


class Chat:
    """A conversation. `messages` holds what was said, the system message first if there is one.

    loaded: the model;  encoder: of its tokenizer and a template (`encoder_of`)
    max_tokens: of a reply;  sampling: how its tokens are chosen; every reply has a seed of its own
    """

    def __init__(
        self,
        loaded: Loaded,
        encoder: ChatEncoder,
        system: str = "",
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = Sampling(),
    ):
        self._engine, self._tokenizer, self._encoder = loaded.engine, loaded.tokenizer, encoder
        self._max_tokens, self._sampling, self._count = max_tokens, sampling, 0
        self._ends = {*loaded.tokenizer.ends, *encoder.ends}
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self.num_dropped = 0  # turns of the user that the model no longer sees
        self.clear()

    @property
    def context(self) -> int:
        """Tokens of the model's window."""
        return self._engine.context

    def clear(self) -> None:
        """Forgets what was said, but for the system message."""
        self.messages, self.num_dropped = list(self._system), 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to a message as it is made; it ends at the end of its turn. Raises at once.

        `messages` has both when the reply ends, also if it is closed before; without a character of it, neither. White
        space around a reply is not kept: templates write their own.

        Raises HandgradError for a message that leaves no room for a reply, and one that the template does not take.
        """
        kept, ids = self._within_window([*self.messages, {"role": "user", "content": text}])
        self.num_dropped += (len(self.messages) + 1 - len(kept)) // 2
        self.messages = kept[:-1]
        sampling = replace(self._sampling, seed=self._sampling.seed + self._count)
        self._count += 1
        room = min(self._max_tokens, self.context - len(ids))
        tokens = self._engine.generate(ids, room, sampling, self._ends, reuse=True)
        return self._told(kept[-1], self._tokenizer.stream(tokens))

    def _told(self, asked: dict[str, Any], pieces: Iterator[str]) -> Generator[str, None, None]:
        """Yields pieces, and adds them to the messages when they end."""
        said, is_over = "", False
        try:
            for piece in pieces:
                said += piece
                yield piece
            is_over = True
        finally:
            if said or is_over:
                self.messages += [asked, {"role": "assistant", "content": said.strip()}]

    def _within_window(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """(the messages that leave room for a reply, their ids). The system message and the last one stay."""
        first, room = len(self._system), min(self._max_tokens, self.context // ROOM)
        while True:
            ids = self._encoder.prompt(messages)
            if len(ids) + room <= self.context:
                return messages, ids
            if len(messages) == first + 1:
                break
            messages = messages[:first] + messages[first + 2 :]
        if len(ids) >= self.context:
            rule = f"a message and its reply fit into the {self.context} tokens that the model reads"
            raise HandgradError("chat", rule, f"a chat of {len(ids)} tokens", hint="--context, if the model reads more")
        return messages, ids
