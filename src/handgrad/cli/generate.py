"""handgrad generate RUN: continues or answers a prompt with the newest checkpoint of a run folder, streaming it."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from handgrad.cli.compute import Compute
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.infer.load import MAX_TOKENS, load
from handgrad.infer.sampling import Sampling, StopStrings


@dataclass(frozen=True)
class Generate:
    """Model, prompt and sampling."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, one of its checkpoints, a .bin of llm.c, a .gguf, a Hugging Face folder, or hf:NAME"""
    prompt: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: a line break)")] = None
    """text to continue, or source of a T5 with <extra_id_0> .. for gaps; -: standard input"""
    max_tokens: int = MAX_TOKENS
    """tokens to generate"""
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
    stop: tuple[str, ...] = ()
    """stop before any of these strings"""
    ema: bool = False
    """the average of the weights that train --ema keeps"""
    special_tokens: bool = False
    """a special token spelled out in the prompt, such as <|endoftext|>, is that token; else it is plain text"""
    compute: Compute = field(default_factory=Compute)


def main(argv: list[str]) -> int:
    """Prints the prompt and its continuation, or what an encoder-decoder writes about it."""
    a = parse(Generate, argv, "generate")
    if a.max_tokens < 1:
        raise HandgradError("generate", "--max-tokens is at least 1", a.max_tokens)
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.seed)  # wrong values show before the model is read
    StopStrings(a.stop)
    prompt = read_prompt() if a.prompt == "-" else a.prompt
    if prompt == "":
        raise HandgradError("generate", "a prompt holds at least one character", "an empty one")
    loaded = load(a.run, *a.compute.settings, whole("generate", "--context", a.context, 0), a.ema)
    pieces = loaded.stream(prompt, a.max_tokens, **asdict(sampling), stop=a.stop, special_tokens=a.special_tokens)
    if loaded.model.continues_text:
        print("\n" if prompt is None else prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def read_prompt() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise HandgradError("generate", "a prompt is UTF-8 text", found) from None
