"""handgrad chat MODEL: a conversation in the terminal, or of the lines on standard input."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from handgrad.cli.compute import Compute
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.infer.chat import Chat, encoder_of
from handgrad.infer.load import MAX_TOKENS, Loaded, engine_of, open_source
from handgrad.infer.sampling import Sampling

HELP = "/clear starts over, /quit or Ctrl-D ends, Ctrl-C stops a reply"


@dataclass(frozen=True)
class Chats:
    """Model, template and sampling."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, one of its checkpoints, a .gguf, a Hugging Face folder, or hf:NAME"""
    system: str = ""
    """a system message: what the model is told before the conversation; empty: none"""
    template: str = ""
    """chatml, gemma, llama3, mistral, qwen2.5, or a Jinja file; empty: the model's own"""
    max_tokens: int = MAX_TOKENS
    """tokens of a reply at most"""
    temperature: float = Sampling.temperature
    """0: always the likeliest token"""
    top_k: int = Sampling.top_k
    """sample from the k likeliest tokens; 0: all"""
    top_p: float = Sampling.top_p
    """sample from the likeliest tokens that hold this probability together"""
    seed: int = Sampling.seed
    """seed of the sampling"""
    context: int = 0
    """tokens that the model sees at most; 0: its longest, and 2048 at most for a Llama"""
    ema: bool = False
    """the average of the weights that train --ema keeps"""
    compute: Compute = field(default_factory=Compute)


def main(argv: list[str]) -> int:
    """Converses until /quit or the end of the input. Without a terminal, every line of the input is a message."""
    a = parse(Chats, argv, "chat")
    if a.max_tokens < 1:
        raise HandgradError("chat", "--max-tokens is at least 1", a.max_tokens)
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.seed)  # wrong values show before the model is read
    context = whole("chat", "--context", a.context, 0)
    source = open_source(a.run, a.ema)
    encoder = encoder_of(source, a.template, a.system)
    source = replace(source, tokenizer=lambda: encoder.tokenizer)  # which took a while to read
    loaded = Loaded(*engine_of(source, *a.compute.settings, context))
    chat = Chat(loaded, encoder, a.system, a.max_tokens, sampling)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(f"template {encoder.name}, a window of {chat.context:,} tokens. {HELP}")
    for text in typed() if on_terminal else lines():
        if text == "/clear":
            chat.clear()
        elif text == "/quit":
            break
        elif text:
            converse(chat, text, on_terminal)
    return 0


def converse(chat: Chat, text: str, on_terminal: bool) -> None:
    """Prints the reply to a message. In a terminal Ctrl-C stops it, and a mistake does not end the conversation."""
    before = chat.num_dropped
    try:
        with closing(chat.reply(text)) as pieces:
            if dropped := chat.num_dropped - before:
                turns = "the oldest turn is" if dropped == 1 else f"the oldest {dropped} turns are"
                say(f"the window of {chat.context:,} tokens is full: {turns} dropped")
            for piece in pieces:
                print(piece, end="", flush=True)
    except HandgradError as error:
        if not on_terminal:
            raise
        print(error, file=sys.stderr)
        return
    except KeyboardInterrupt:
        if not on_terminal:
            raise
    print(flush=True)


def say(text: str) -> None:
    """Tells the user something that is no reply."""
    print(f"[chat] {text}.", file=sys.stderr)


def typed() -> Iterator[str]:
    """The messages that a user types, until Ctrl-D. Ctrl-C discards a line."""
    with suppress(ImportError):
        import readline  # noqa: F401  arrows and earlier lines, in `input`
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            say(f"a message is UTF-8 text, but got byte 0x{error.object[error.start]:02x}")


def lines() -> Iterator[str]:
    """The lines of standard input."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} at offset {error.start} of line {number}"
            raise HandgradError("chat", "a message is UTF-8 text", found) from None
