"""Which tokens end a text: what the files beside a tokenizer say, and what a tokenizer.json alone lets one guess."""

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object, shown

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL_FILES = ("generation_config.json", "config.json")  # in the order in which transformers' `generate` asks them
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # whose end is <|endoftext|> unless a file says another
KNOWN = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "</s>", "[SEP]")  # by model family


def ends_of(folder: Path, vocab: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the ids that end a text in a Hugging Face folder; the first separates documents.

    The model's files say it by id, else the tokenizer's by its text, a BERT's as sep_token. An id or text that the
    vocabulary lacks says nothing: transformers' own default, 50256, stands in the config.json of models of any size.
    Where no file says anything, a bare tokenizer.json (or vocab.json) ends with the first of KNOWN that it has.

    Raises HandgradError if a file is damaged.
    """
    by_id = model_ends(folder, set(vocab.values()))
    if by_id:
        return by_id
    says_none = by_id is not None
    files = [path for path in (folder / CONFIG, folder / SPECIAL) if os.path.exists(path)]
    for path in files:
        about = read_object(path, "tokenizer")
        default = KNOWN[0] if path.name == CONFIG and about.get("tokenizer_class") in GPT2_CLASSES else None
        token = content(about.get("eos_token", about.get("sep_token", default)), f"{path} gives eos_token")
        if token is not None and token in vocab:
            return (vocab[token],)
        says_none |= "eos_token" in about and token is None
    return () if says_none or files else known_ends(vocab)


def model_ends(folder: Path, ids: Container[int]) -> tuple[int, ...] | None:
    """Returns the ids that end a text by the model's files, of those in `ids`; None if the files say nothing."""
    says_none = False
    for name in MODEL_FILES:
        about = read_if_there(folder / name)
        if "eos_token_id" in about:
            found = id_list(about["eos_token_id"], f"{folder / name} gives eos_token_id")
            known = tuple(id for id in found if id in ids)
            if known:
                return known
            says_none |= not found
    return () if says_none else None


def known_ends(vocab: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the end that a vocabulary lets one guess, as a tuple of one id or none."""
    return next(((vocab[end],) for end in KNOWN if end in vocab), ())


def id_list(value: object, rule: str) -> tuple[int, ...]:
    """Returns null, an id or a list of ids as a tuple without repetitions. Raises HandgradError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(id) is not int for id in ids):
        raise HandgradError("tokenizer", f"{rule} as an id, a list of ids, or null", shown(value))
    return tuple(dict.fromkeys(ids))


def content(value: object, rule: str) -> str | None:
    """Returns the text of a token that is given as text, as an object with a `content`, or as null."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise HandgradError("tokenizer", f"{rule} as text, or as an object with a content", shown(value))
    return text


def added_tokens(folder: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Returns (id, text, flags) of the tokens that a folder adds to its vocabulary, by id. flags: of AddedToken."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    about = read_if_there(folder / CONFIG)
    named = [token for key, token in (about | read_if_there(folder / SPECIAL)).items() if key.endswith("_token")]
    special = [token.get("content") if isinstance(token, dict) else token for token in named]
    for text, id in read_if_there(folder / ADDED).items():
        if type(id) is not int:
            raise HandgradError("tokenizer", f"{folder / ADDED} maps text to ids", shown(id))
        found[id] = text, {"special": text in special}
    decoder = about.get("added_tokens_decoder") or {}
    rule = f"{folder / CONFIG} lists added_tokens_decoder"
    if not isinstance(decoder, dict):
        raise HandgradError("tokenizer", f"{rule} as an object", shown(decoder))
    for id, token in decoder.items():
        added = content(token, rule)
        if added is None or not id.isascii() or not id.isdigit() or len(id) > 20:
            raise HandgradError("tokenizer", f"{rule} as ids and tokens", f"{shown(id)} and {shown(added)}")
        flags = token if isinstance(token, dict) else {}
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        found[int(id)] = added, {name: flags[name] for name in names if type(flags.get(name)) is bool}
    return [(id, *found[id]) for id in sorted(found)]


def read_if_there(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one if there is no such file."""
    return read_object(path, "tokenizer") if os.path.exists(path) else {}
