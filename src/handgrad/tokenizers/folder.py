"""Tokenizers in a Hugging Face model folder, and in llm.c's format: a table of token bytes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.chars import CharTokenizer
from handgrad.tokenizers.file import FILE, FileTokenizer, from_file, library_must
from handgrad.tokenizers.gpt2 import MERGES, GPT2Tokenizer, gpt2, spelled_bytes

VOCAB, MERGED, CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"


def from_folder(folder: str | Path) -> Tokenizer | None:
    """Returns the tokenizer in a Hugging Face folder, from tokenizer.json or vocab.json and merges.txt; None without.

    GPT-2's tokenizer is returned as `gpt2()`, one whose tokens are single characters as a CharTokenizer.
    Raises HandgradError if the files are invalid.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        found = from_file(folder / FILE)
    elif (folder / VOCAB).is_file() and (folder / MERGED).is_file():
        with library_must(f"{folder / VOCAB} and {MERGED} must describe a tokenizer"):
            found = FileTokenizer(_byte_level(models.BPE.from_file(str(folder / VOCAB), str(folder / MERGED))), VOCAB)
    else:
        return None
    rules, vocab = _rules(found.library), found.library.get_vocab()
    if found.vocab_size == gpt2().vocab_size and rules == _rules(_gpt2()):
        return gpt2()
    characters = "".join(sorted(vocab, key=vocab.__getitem__))
    if len(characters) == len(vocab) == found.vocab_size and rules == _rules(_of_characters(characters)):
        return CharTokenizer(characters)
    return found


def to_folder(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes `tokenizer` into a Hugging Face folder, for transformers' AutoTokenizer.

    Raises HandgradError if the folder is not writable.
    """
    folder = Path(folder)
    kind, config = "PreTrainedTokenizerFast", dict[str, str | None]()
    if isinstance(tokenizer, GPT2Tokenizer):
        kind, library = "GPT2Tokenizer", _gpt2()
        vocab = library.get_vocab(with_added_tokens=True)
        text = json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False)
        (folder / VOCAB).write_text(text, encoding="utf-8")
        shutil.copyfile(MERGES, folder / MERGED)
    elif isinstance(tokenizer, CharTokenizer):
        library = _of_characters(tokenizer.characters)
    elif isinstance(tokenizer, FileTokenizer):
        library = tokenizer.library
    else:
        raise HandgradError("tokenizer", "a tokenizer must be gpt2, chars or a tokenizer.json", tokenizer.name)
    if tokenizer.eot is not None:
        config = dict.fromkeys(("bos_token", "eos_token"), library.id_to_token(tokenizer.eot))
    with library_must(f"{folder} must be writable"):
        library.save(str(folder / FILE))
    text = json.dumps({"tokenizer_class": kind, "clean_up_tokenization_spaces": False, **config}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def from_tokens(tokens: Iterable[bytes]) -> Tokenizer:
    """Returns the tokenizer that has these tokens, in the order of their ids: `gpt2()` or a CharTokenizer.

    Raises HandgradError for other tables: without merges they do not define an encoding.
    """
    tokens = list(tokens)
    if tokens == [gpt2().bytes_of(id) for id in range(gpt2().vocab_size)]:
        return gpt2()
    try:
        characters = [token.decode("utf-8") for token in tokens]
    except UnicodeDecodeError:
        characters = [""]
    if any(len(c) != 1 for c in characters) or len(set(characters)) < len(characters):
        rule = "a table of tokens can encode text if it is GPT-2's, or holds characters"
        raise HandgradError("tokenizer", rule, f"{len(tokens)} other tokens", hint="use a tokenizer.json")
    return CharTokenizer("".join(characters))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns byte-level BPE with GPT-2's pre-tokenizer and its <|endoftext|>."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return library


def _gpt2() -> tokenizers.Tokenizer:
    spell = {byte: character for character, byte in spelled_bytes().items()}
    ours = gpt2()
    vocab = {"".join(spell[byte] for byte in ours.bytes_of(id)): id for id in range(ours.eot)}
    vocab["<|endoftext|>"] = ours.eot
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    return _byte_level(models.BPE(vocab, merges))


def _of_characters(characters: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(characters)}, []))
    library.decoder = decoders.Fuse()
    return library


def _rules(library: tokenizers.Tokenizer) -> list[Any]:
    """Returns what determines the library's encoding, comparable with ==."""
    about = json.loads(library.to_str())
    cut = about["pre_tokenizer"] or {}
    return [
        about["normalizer"],
        cut.get("type"),
        cut.get("add_prefix_space"),
        cut.get("use_regex"),
        *(about["model"].get(key) for key in ("type", "vocab", "merges")),
        library.get_vocab(),
    ]
