"""handgrad generate RUN: continues a prompt with the newest checkpoint of a run folder, streaming to the terminal."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.infer.load import load_run
from handgrad.infer.sampling import Sampling, StopStrings


@dataclass(frozen=True)
class Generate:
    """Model, prompt and sampling."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, one of its checkpoints, a .bin of llm.c, a Hugging Face folder, or hf:NAME"""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a line break)")] = "\n"
    """text to continue; -: standard input"""
    max_tokens: int = 256
    """tokens to generate"""
    temperature: float = 0.8
    """0: always the likeliest token"""
    top_k: int = 0
    """sample from the k likeliest tokens; 0: all"""
    top_p: float = 1.0
    """sample from the likeliest tokens that hold this probability together"""
    seed: int = 0
    """seed of the sampling"""
    stop: tuple[str, ...] = ()
    """stop before any of these strings"""
    dtype: Literal["saved", "f32", "bf16"] = "saved"
    """working dtype; saved: the one it was trained in"""
    backend: Literal["auto", "cpu", "cuda", "ref"] = "auto"
    """cpu: C kernels; ref: the numpy oracle"""
    threads: int = 0
    """CPU threads; 0: the physical cores that this process may use"""


def main(argv: list[str]) -> int:
    """Prints the prompt and its continuation."""
    a = parse(Generate, argv, "generate")
    sampling, stop = Sampling(a.temperature, a.top_k, a.top_p, a.seed), StopStrings(a.stop)
    if a.max_tokens < 1:
        raise HandgradError("generate", "--max-tokens is at least 1", a.max_tokens)
    prompt = read_prompt() if a.prompt == "-" else a.prompt
    if not prompt:
        raise HandgradError("generate", "a prompt holds at least one character", "an empty one")
    engine, tokenizer = load_run(a.run, a.dtype, a.backend, a.threads)
    ids = tokenizer.encode(prompt).tolist()
    print(prompt, end="", flush=True)
    for piece in tokenizer.stream(engine.generate(ids, a.max_tokens, sampling, tokenizer.eot)):
        print(stop.feed(piece), end="", flush=True)
        if stop.found is not None:
            break
    print(stop.finish())
    return 0


def read_prompt() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise HandgradError("generate", "a prompt is UTF-8 text", found) from None
