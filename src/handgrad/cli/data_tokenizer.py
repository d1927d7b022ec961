"""handgrad data tokenizer: trains byte-level BPE on text files, or adds special tokens to a tokenizer."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import tyro

from handgrad import data, tokenizers
from handgrad.core.disk import make_folder, require_file
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.replace import replace, restore, staged
from handgrad.infer.load import open_source
from handgrad.io import checkpoint, newest
from handgrad.io.gguf_file import is_gguf

Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...", help_behavior_hint="")]
MoreFiles = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE...", help_behavior_hint="")]
HELD_OUT = 0.05  # of the text, at its end, unless files are given
REPORT = "tokenizer_report.json"
MADE = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", REPORT}


@dataclass(frozen=True)
class Training:
    """A tokenizer of one's own: byte-level BPE, cut as GPT-4's."""

    files: Files = ()
    """UTF-8 text files to train on"""
    vocab: int = 16384
    """tokens: 256 bytes, merges, <|endoftext|>, and those of --special"""
    special: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN...", help_behavior_hint="")] = ()
    """special tokens besides <|endoftext|>, such as '<|im_start|>' '<|im_end|>'"""
    extend: str = ""
    """gpt2, a tokenizer.json or a folder with one: no training, --special is added to this tokenizer"""
    held_out: MoreFiles = ()
    """text files to measure bytes per token on; none: the last 5 % of the text, which is not trained on"""
    out: str = ""
    """folder for tokenizer.json, tokenizer_config.json and tokenizer_report.json; empty: tokenizer"""
    replace: bool = False
    """replace a folder that holds only a tokenizer"""


def train_tokenizer(a: Training, default: str) -> None:
    """Writes the tokenizer and its report into a folder, and prints bytes per token."""
    out = Path(a.out or default)
    _check(a, out)
    tokenizer, report = _extended(a) if a.extend else _trained(a)
    try:
        restore(out)
        make_folder(out.parent)
        with staged(out) as new:
            new.mkdir()
            tokenizers.to_folder(tokenizer, new)
            (new / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            replace(new, out)
    except OSError as error:
        raise HandgradError("data", f"'{out}' must be writable", error.strerror or error) from None
    names = ", ".join(f"{token} {tokenizer.library.token_to_id(token)}" for token in tokenizer.specials)
    print(f"{out}: {tokenizer.vocab_size:,} tokens; special: {names}")
    if report.get("vocab_size", a.vocab) < a.vocab and not a.extend:
        print(f"fewer than --vocab {a.vocab:,}: no other pair of tokens is in the text twice")
    if "held_out" in report:
        held = report["held_out"]
        what = f"{held['bytes']:,} bytes that were not trained on"
        print(f"{held['bytes_per_token']:.3f} bytes per token on {what}; gpt2 {held['gpt2_bytes_per_token']:.3f}")
    print(f"use it: handgrad data text FILE... --tokenizer {quote(str(out))}")


def _check(a: Training, out: Path) -> None:
    if a.extend and (a.files or a.held_out or a.vocab != Training.vocab):
        rule = "--extend adds --special to a tokenizer and trains nothing"
        raise HandgradError("data", rule, "files, --held-out or --vocab", hint="leave them out")
    if a.extend and not a.special:
        raise HandgradError("data", "--extend adds the tokens of --special", "none")
    if not a.extend and not a.files:
        hint = "handgrad data tokenizer FILE..."
        raise HandgradError("data", "a tokenizer is trained on at least one file", "none", hint=hint)
    if not os.path.lexists(out):
        return
    others = sorted({path.name for path in out.iterdir()} - MADE) if out.is_dir() else [out.name]
    if not a.replace and (others or any(out.iterdir())):
        raise HandgradError("data", f"'{out}' exists already", hint="use another --out, or --replace")
    if others:
        raise HandgradError("data", f"--replace is for a folder that holds only a tokenizer: '{out}'", others[0])


def _extended(a: Training) -> tuple[tokenizers.FileTokenizer, dict[str, Any]]:
    tokenizer = tokenizers.extend(tokenizer_of(a.extend), a.special)
    return tokenizer, {"vocab_size": tokenizer.vocab_size, "extends": a.extend, "special": list(tokenizer.specials)}


def _trained(a: Training) -> tuple[tokenizers.FileTokenizer, dict[str, Any]]:
    """The tokenizer, and what is worth knowing of it."""
    parts, text, tail = data.split_text(a.files, 0 if a.held_out else HELD_OUT)
    sizes = {split: sum(part.size for part in parts if part.split == split) for split in ("train", "val")}
    left = sum(require_file(path, "a text", "data") for path in a.held_out) if a.held_out else sizes["val"]
    if left == 0 or sizes["train"] == 0:
        got = f"{sizes['train']:,} and {left:,} bytes"
        raise HandgradError("data", "the text to train on and the held-out text must not be empty", got)
    tokenizer = tokenizers.train(text, a.vocab, a.special)
    nbytes, *counts = tokenizers.measure(
        data.read_text(a.held_out) if a.held_out else tail, tokenizer, tokenizers.gpt2()
    )
    own, of_gpt2 = (nbytes / count for count in counts)
    return tokenizer, {
        "vocab_size": tokenizer.vocab_size,
        "special": list(tokenizer.specials),
        "cut": tokenizers.RULE,
        "trained_on": {"bytes": sizes["train"], "sha256": {part.get().name: part.sha256 for part in parts}},
        "held_out": {"bytes": nbytes, "bytes_per_token": own, "gpt2_bytes_per_token": of_gpt2},
    }


def tokenizer_of(word: str, texts: Sequence[str | Path] = ()) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `word` names; the characters of `texts` for "chars"."""
    if word == "gpt2":
        return tokenizers.gpt2()
    if word == "chars":
        return tokenizers.chars(data.read_text(texts))
    is_model = os.path.isfile(word) and (word.endswith(".bin") or is_gguf(Path(word)))
    if is_model or word.startswith("hf:"):
        return open_source(word).tokenizer()
    near = "" if os.path.exists(word) else did_you_mean(word, ["gpt2", "chars"])
    if near:
        rule = "--tokenizer is gpt2, chars, a file tokenizer.json or a folder that holds one"
        raise HandgradError("data", rule, f"'{word}'", hint=near)
    if not os.path.isdir(word):
        return tokenizers.from_file(word)
    found = tokenizers.from_folder(word)
    if found is None and (newest(Path(word)) or checkpoint.is_checkpoint(Path(word))):  # such as one of characters
        return open_source(word).tokenizer()
    if found is None:
        hint = "handgrad data tokenizer makes one"
        raise HandgradError(
            "data", f"'{word}' must hold a tokenizer.json, or vocab.json and merges.txt", "none", hint=hint
        )
    return found
