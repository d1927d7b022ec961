"""BERT's WordPiece as vocab.txt describes it, and which tokens of a WordPiece continue a word."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.tokenizers.ends import content

VOCAB = "vocab.txt"
# the names that files give the special tokens, with BERT's own texts
SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def word_piece(text: str, about: Mapping[str, Any], source: object) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer of a vocab.txt: a token a line, its id the number of the line, from 0.

    about: the tokenizer_config.json beside it: do_lower_case, strip_accents, tokenize_chinese_chars, special tokens

    Raises HandgradError that names the source if a setting has another type, or a special token is missing.
    """
    lines = text.removesuffix("\n").split("\n")  # other breaks are characters of tokens
    vocab = {line.rstrip("\r"): id for id, line in enumerate(lines)}
    special = {name: content(about.get(f"{name}_token", usual), name) or usual for name, usual in SPECIAL.items()}
    for name in ("unk", "cls", "sep"):
        if special[name] not in vocab:
            rule = f"{source} is WordPiece: it holds {shown(special[name])}"
            raise HandgradError("tokenizer", rule, f"{len(vocab):,} other tokens")
    settings = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None} | dict(about)
    lower, chinese, strip = (settings[key] for key in ("do_lower_case", "tokenize_chinese_chars", "strip_accents"))
    for key, value in (("do_lower_case", lower), ("tokenize_chinese_chars", chinese), ("strip_accents", strip)):
        if type(value) is not bool and (value is not None or key != "strip_accents"):
            raise HandgradError("tokenizer", f"the settings beside {source} give {key} as true or false", shown(value))
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk"]))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip, lowercase=lower
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.post_processor = processors.TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        pair=f"{special['cls']} $A {special['sep']} $B:1 {special['sep']}:1",
        special_tokens=[(special[name], vocab[special[name]]) for name in ("cls", "sep")],
    )
    library.add_special_tokens([token for token in special.values() if token in vocab])
    return library


def continuing(library: tokenizers.Tokenizer) -> np.ndarray | None:
    """Returns which ids continue a word, as ## does, (n,) bool; None if the tokenizer is no WordPiece."""
    model = json.loads(library.to_str())["model"]
    if model.get("type") != "WordPiece":
        return None
    prefix = model["continuing_subword_prefix"]
    found = np.zeros(max(library.get_vocab().values()) + 1, bool)
    found[[id for token, id in model["vocab"].items() if token.startswith(prefix) and token != prefix]] = True
    return found
