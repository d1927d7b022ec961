"""BPE in a file of llama.cpp (GGUF): byte-level, with tokens, merges and the name of the rule that cuts text before
them, or SentencePiece's, with tokens and scores (tokenizers/sentencepiece.py).

The rules are those of each model's own tokenizer.json. llama.cpp has them by name, under tokenizer.ggml.pre.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.tokenizers.base import Tokenizer
from handgrad.tokenizers.ends import id_list
from handgrad.tokenizers.file import library_must, put_before
from handgrad.tokenizers.folder import library_of, recognised
from handgrad.tokenizers.sentencepiece import BYTES, SPACE, from_scores, is_sentence_piece, scores_of
from handgrad.tokenizers.template import IN_GGUF, OwnTemplate

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # what a token is; of llama.cpp
MOST_ADDED = 1 << 16  # tokens that are found before the text is cut; the library takes a second for them
# GPT-4's way to cut text: contractions, words, numbers of so many digits, punctuation, white space
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


RULES = {  # tokenizer.ggml.pre: what cuts the text
    "gpt-2": _byte_level(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _words("{1,3}"),
    "qwen2": _words(""),
}


def from_gguf(metadata: Mapping[str, Any], source: object) -> Tokenizer:
    """Returns the tokenizer that a file's metadata describe. Raises HandgradError that names the source for others."""
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    is_scored = kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False
    if not is_scored and (kind != "gpt2" or not isinstance(pre, str) or pre not in RULES):
        rule = f"{source} has a tokenizer gpt2 of the kind {' or '.join(RULES)}, or llama without add_space_prefix"
        raise HandgradError("tokenizer", rule, f"{shown(kind)} of the kind {shown(pre)}")
    tokens = _texts(metadata, "tokens", source)
    tokens = [token.replace(" ", SPACE) for token in tokens] if is_scored else tokens
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not hasattr(types, "__len__") or isinstance(types, str):
        raise HandgradError("tokenizer", f"{source} gives a list of token types", shown(types))
    types = list(types)
    if len(types) != len(tokens) or len(set(tokens)) < len(tokens):
        rule = f"{source} lists tokens, each once and with its type"
        raise HandgradError("tokenizer", rule, f"{len(tokens):,} tokens, {len(types):,} types")
    num_added = sum(type in (CONTROL, UNKNOWN, USER_DEFINED) for type in types)
    if num_added > MOST_ADDED:
        raise HandgradError("tokenizer", f"{source} has at most {MOST_ADDED:,} special tokens", f"{num_added:,}")
    with library_must(f"{source} must describe a tokenizer"):
        library = (_scored if is_scored else _byte_level_of)(metadata, tokens, types, source)
        for kinds, is_special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
            # spaces of text are no added token: merges make those of several
            found = [t for t, type in zip(tokens, types) if type in kinds and not (is_scored and SPACE in t)]
            added = [AddedToken(t, special=is_special, normalized=False) for t in found]
            (library.add_special_tokens if is_special else library.add_tokens)(added)
        begin: Any = metadata.get("tokenizer.ggml.bos_token_id")
        adds = metadata.get("tokenizer.ggml.add_bos_token", is_scored or pre == "llama-bpe")  # llama.cpp's default
        if adds and begin in range(len(tokens)):
            put_before(library, tokens[begin])
        return recognised(library, "gguf", ends_in_gguf(metadata, len(tokens), source))


def _byte_level_of(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: object
) -> tokenizers.Tokenizer:
    """Byte-level BPE with the file's merges, without the tokens that are found before them."""
    pre, merges = metadata["tokenizer.ggml.pre"], _texts(metadata, "merges", source)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if any(" " in right for _, right in pairs):
        raise HandgradError("tokenizer", f"{source} lists merges of two tokens", "one of more")
    vocab = {token: id for id, (token, type) in enumerate(zip(tokens, types)) if type != UNUSED}
    library = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer, library.decoder = RULES[pre], decoders.ByteLevel()
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    return library


def _scored(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: object) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with the file's scores, without the tokens that are found before merges."""
    scores: Any = metadata.get("tokenizer.ggml.scores")
    if not hasattr(scores, "__len__") or isinstance(scores, str) or len(scores) != len(tokens):
        raise HandgradError("tokenizer", f"{source} gives a score for each of {len(tokens):,} tokens", shown(scores))
    vocab = {token: id for id, (token, type) in enumerate(zip(tokens, types)) if type != UNUSED}
    unknown = next((token for token, type in zip(tokens, types) if type == UNKNOWN), None)
    merged = {t: float(s) for t, s, type in zip(tokens, scores, types) if type in (NORMAL, USER_DEFINED)}
    return from_scores(vocab, merged, unknown)


def ends_in_gguf(metadata: Mapping[str, Any], count: int, source: object) -> tuple[int, ...]:
    """Returns the ids below `count` that end a text."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ids = [metadata[key] for key in keys if key in metadata]
    return tuple(id for id in id_list(ids, f"{source} gives ends") if 0 <= id < count)


def to_gguf(tokenizer: Tokenizer, count: int, template: OwnTemplate = OwnTemplate()) -> dict[str, Any]:
    """Returns the metadata that describe a tokenizer, and its template of chats, to llama.cpp, for a model of `count`
    ids.

    Raises HandgradError for a tokenizer that is neither byte-level BPE which cuts text as one of RULES does, nor BPE as
    Gemma has it.
    """
    library = library_of(tokenizer)
    about = json.loads(library.to_str())
    pre = next((name for name, rule in RULES.items() if _steps(rule) == _steps(library.pre_tokenizer)), None)
    is_scored = is_sentence_piece(about)
    if not is_scored and (about["model"].get("type") != "BPE" or pre is None):
        rule = f"llama.cpp reads byte-level BPE that cuts text as {' or '.join(RULES)} does, and Gemma's BPE"
        raise HandgradError("tokenizer", rule, tokenizer.name, hint="--to hf keeps any tokenizer")
    if tokenizer.vocab_size > count:
        rule = f"a tokenizer for llama.cpp has at most the {count:,} ids of the model"
        raise HandgradError("tokenizer", rule, f"{tokenizer.vocab_size:,}")
    tokens, types = [f"[PAD{id}]" for id in range(count)], [UNUSED] * count
    for token, id in library.get_vocab(with_added_tokens=True).items():
        tokens[id], types[id] = token, BYTE if is_scored and token in BYTES else NORMAL
    for id, added in library.get_added_tokens_decoder().items():
        is_unknown = is_scored and added.content == about["model"]["unk_token"]
        types[id] = UNKNOWN if is_unknown else CONTROL if added.special else USER_DEFINED
    found: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if is_scored:
        scores = scores_of(about, frozenset(added.content for added in library.get_added_tokens_decoder().values()))
        found |= {"model": "llama", "pre": "default", "add_space_prefix": False}
        found["scores"] = [scores.get(token, -float(len(scores))) for token in tokens]
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in about["model"]["merges"]]
        found |= {"model": "gpt2", "pre": pre, "merges": merges}
    begin, end = (library.token_to_id(template.tokens.get(name, "")) for name in ("bos_token", "eos_token"))
    ends = sorted(tokenizer.ends, key=lambda id: id != end)  # the one that the template calls eos_token goes first
    found |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends))
    if begin is not None or tokenizer.begins or tokenizer.ends:
        found["bos_token_id"] = begin if begin is not None else (tokenizer.begins or tokenizer.ends)[0]
    found["add_bos_token"] = bool(tokenizer.begins)
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return named | ({IN_GGUF: template.source} if template.source else {})


def _texts(metadata: Mapping[str, Any], key: str, source: object) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list):
        raise HandgradError("tokenizer", f"{source} lists the texts tokenizer.ggml.{key}", shown(found))
    return found


def _steps(rule: Any) -> object:
    """What determines how a pre-tokenizer cuts text, comparable with ==."""
    about = {} if rule is None else json.loads(rule.__getstate__())
    steps: Iterable[dict[str, Any]] = about.get("pretokenizers", [about])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
