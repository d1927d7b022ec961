"""Tokenizers in a Hugging Face model folder, and in llm.c's format: a table of token bytes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object, shown
from handgrad.tokenizers import wordpiece
from handgrad.tokenizers.base import MAX_IDS, Tokenizer
from handgrad.tokenizers.chars import CharTokenizer
from handgrad.tokenizers.ends import CONFIG, added_tokens, content, ends_of, read_if_there
from handgrad.tokenizers.file import (
    FILE,
    MOST_BYTES,
    FileTokenizer,
    library_must,
    put_before,
    read_library,
    special_ids,
    vocabulary,
)
from handgrad.tokenizers.gpt2 import MERGES, GPT2Tokenizer, gpt2, spelled_bytes
from handgrad.tokenizers.template import OWN, ROLES, OwnTemplate, variables

VOCAB, MERGED = "vocab.json", "merges.txt"


def from_folder(folder: str | Path) -> Tokenizer | None:
    """Returns the tokenizer in a Hugging Face folder, from tokenizer.json, from vocab.json and merges.txt, or from
    BERT's vocab.txt; None without.

    GPT-2's tokenizer is returned as `gpt2()`, one whose tokens are single characters as a CharTokenizer.
    Raises HandgradError if the files are invalid.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        library, name = read_library(folder / FILE), FILE
    elif (folder / VOCAB).is_file() and (folder / MERGED).is_file():
        library, name = _read_merges(folder), VOCAB
    elif (folder / wordpiece.VOCAB).is_file():
        library, name = read_library(folder / wordpiece.VOCAB), wordpiece.VOCAB
    else:
        return None
    _add(library, folder)
    if name == VOCAB:
        _put_before(library, folder)
    return recognised(library, name, ends_of(folder, vocabulary(library, folder / name)))


def recognised(library: tokenizers.Tokenizer, name: str, ends: tuple[int, ...]) -> Tokenizer:
    """Returns the tokenizer of a library's: `gpt2()` or a CharTokenizer where it is one of them."""
    found, vocab = FileTokenizer(library, name, ends), library.get_vocab(with_added_tokens=True)
    if found.begins:
        return found
    rules = _rules(library)
    if found.vocab_size == gpt2().vocab_size and ends == gpt2().ends and rules == _rules(_gpt2()):
        return gpt2()
    characters = "".join(sorted(vocab, key=vocab.__getitem__))
    if len(characters) == len(vocab) == found.vocab_size and rules == _rules(_of_characters(characters)):
        return CharTokenizer(characters, ends)
    return found


def to_folder(tokenizer: Tokenizer, folder: str | Path, template: OwnTemplate = OwnTemplate()) -> None:
    """Writes `tokenizer` into a Hugging Face folder, for transformers' AutoTokenizer.

    template: for its apply_chat_template, with the special tokens that `ChatEncoder` gives it, and no others

    Raises HandgradError if the folder is not writable.
    """
    folder, kind, library = Path(folder), "PreTrainedTokenizerFast", library_of(tokenizer)
    if isinstance(tokenizer, GPT2Tokenizer):
        kind = "GPT2Tokenizer"
        vocab = library.get_vocab(with_added_tokens=True)
        text = json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False)
        (folder / VOCAB).write_text(text, encoding="utf-8")
        shutil.copyfile(MERGES, folder / MERGED)
    end = None if tokenizer.eot is None else library.id_to_token(tokenizer.eot)
    config: dict[str, Any] = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False}
    if special_ids(tokenizer, list(wordpiece.SPECIAL.values())):
        config |= {f"{name}_token": token for name, token in wordpiece.SPECIAL.items()}
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if end not in config.values():
        begin = library.id_to_token(tokenizer.begins[0]) if tokenizer.begins else end
        config |= {"bos_token": begin, "eos_token": end}
    if template.source:
        given, known = variables(tokenizer, template), library.get_vocab(with_added_tokens=True)
        config |= {"bos_token": None} | {
            name: token for name, token in given.items() if name in ROLES and token in known
        }
        (folder / OWN).write_text(template.source, encoding="utf-8")
    with library_must(f"{folder} must be writable"):
        library.save(str(folder / FILE))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def library_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer with the same ids. Raises HandgradError if it has none."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return _gpt2()
    if isinstance(tokenizer, CharTokenizer):
        return _of_characters(tokenizer.characters)
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer.library
    raise HandgradError("tokenizer", "a tokenizer must be gpt2, chars or a tokenizer.json", tokenizer.name)


def from_tokens(tokens: Iterable[bytes], eot: int = 0) -> Tokenizer:
    """Returns the tokenizer that has these tokens, in the order of their ids: `gpt2()` or a CharTokenizer.

    eot: the id that ends a text. 0 says nothing: llm.c's files have no other way to say that there is none.

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
    return CharTokenizer("".join(characters), (eot,) if eot else ())


def _read_merges(folder: Path) -> tokenizers.Tokenizer:
    """Returns byte-level BPE from vocab.json and merges.txt, with the tokens that other files add."""
    vocab: dict[str, Any] = read_object(folder / VOCAB, "tokenizer")
    for id, text, _ in added_tokens(folder):  # in the vocabulary they keep their ids
        if vocab.setdefault(text, id) != id:
            got = f"{shown(vocab[text])} for {shown(text)}"
            raise HandgradError("tokenizer", f"{folder / VOCAB} gives an added token its id {id}", got)
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_IDS:
            rule = f"{folder / VOCAB} gives ids in 0..{MAX_IDS - 1}"
            raise HandgradError("tokenizer", rule, f"{shown(id)} for {shown(text)}")
    if (folder / MERGED).stat().st_size > MOST_BYTES:
        raise HandgradError("tokenizer", f"{folder / MERGED} must have at most {MOST_BYTES:,} bytes", "more")
    with library_must(f"{folder / VOCAB} and {MERGED} must describe a tokenizer"):
        lines = (folder / MERGED).read_text(encoding="utf-8").split("\n")  # other breaks are characters of tokens
        pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"a line of {MERGED} that is not two tokens")
        return _byte_level(models.BPE(vocab, [(left, right) for left, right in pairs]))


def _add(library: tokenizers.Tokenizer, folder: Path) -> None:
    """Adds the tokens that a folder adds to its tokenizer, as transformers does."""
    for id, text, flags in added_tokens(folder):
        token = AddedToken(text, **{"normalized": False} | flags)
        if id not in library.get_added_tokens_decoder():
            with library_must(f"{folder} must add tokens that the library takes"):
                (library.add_special_tokens if token.special else library.add_tokens)([token])
        if library.token_to_id(text) != id:
            got = f"{library.token_to_id(text)} for {shown(text)}"
            raise HandgradError("tokenizer", f"an added token in {folder} must have the id {id} of its list", got)


def _put_before(library: tokenizers.Tokenizer, folder: Path) -> None:
    """Puts the token before every text that tokenizer_config.json asks for. A tokenizer.json says it itself."""
    about = read_if_there(folder / CONFIG)
    token = content(about.get("bos_token"), f"{folder / CONFIG} gives bos_token")
    if about.get("add_bos_token") is True and token is not None and library.token_to_id(token) is not None:
        put_before(library, token)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns byte-level BPE with GPT-2's pre-tokenizer, and its <|endoftext|> if the vocabulary has one."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if library.token_to_id("<|endoftext|>") is not None:
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
