"""SentencePiece's BPE, which Gemma has, in a file of llama.cpp (GGUF): tokens with scores, and no merges.

Any two neighbours whose text is a token become that token, the highest score first; a character that is no token
becomes the tokens of its bytes, <0x00> to <0xFF>. The library has the same as merges, in the order of the scores.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from handgrad.core.errors import HandgradError

SPACE = "\u2581"  # what a space is written as
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Bounds of what is tried as merges: 16 characters for each token of Gemma's, the largest vocabulary in use.
MOST_TOKEN, MOST_CHARACTERS = 256, 1 << 22


def from_scores(vocab: dict[str, int], scores: Mapping[str, float], unknown: str | None) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer. scores: of the tokens that text may become by merges."""
    longest, characters = max(map(len, scores), default=0), sum(map(len, scores))
    if longest > MOST_TOKEN or characters > MOST_CHARACTERS:
        rule = f"tokens have at most {MOST_TOKEN} characters, and {MOST_CHARACTERS:,} in all"
        raise HandgradError("tokenizer", rule, f"{longest:,}, and {characters:,} in all")
    merges: list[tuple[str, str]] = []
    for token in sorted(scores, key=lambda token: -scores[token]):
        merges.extend(_pairs(token, scores))
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", SPACE)
    library.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return library


def is_sentence_piece(about: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind: no space is put before a text, and nothing cuts it."""
    cut = about["pre_tokenizer"] or {"type": "Split", "pattern": {"String": " "}}  # no space is left to cut at
    return (
        about["model"].get("type") == "BPE"
        and about["model"].get("byte_fallback") is True
        and about["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        and (cut["type"], cut.get("pattern")) == ("Split", {"String": " "})
    )


def scores_of(about: Mapping[str, Any], added: frozenset[str]) -> dict[str, float]:
    """Returns the scores of the tokens that merges make, of a tokenizer.json of this kind.

    added: tokens that are found before anything is merged

    Raises HandgradError if the same text could become other tokens by these scores.
    """
    vocab: Mapping[str, int] = about["model"]["vocab"]
    for byte, token in enumerate(BYTES):
        if token not in vocab and not (byte < 128 and chr(byte) in vocab):
            raise HandgradError("tokenizer", "llama.cpp needs a token for every byte", f"none for {token}")
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in about["model"]["merges"]]
    made = [token for token, _ in groupby(left + right for left, right in pairs)]
    apart = [token for token in made if token not in added]
    if len(apart) > len(set(apart)):
        raise HandgradError("tokenizer", "llama.cpp has one score for all merges that make a token", "several")
    missing = {pair for token in vocab if token not in added for pair in _pairs(token, vocab)} - set(pairs)
    if missing:
        got = f"no merge of {' and '.join(map(repr, min(missing)))}"
        rule = "llama.cpp merges any two neighbours whose text is a token"
        raise HandgradError("tokenizer", rule, got, hint="--to hf keeps any tokenizer")
    return {token: -float(rank) for rank, token in reversed(list(enumerate(made)))}


def _pairs(token: str, known: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The pairs of known tokens that make a token, the longest left one first."""
    for i in range(len(token) - 1, 0, -1):
        if token[:i] in known and token[i:] in known:
            yield token[:i], token[i:]
