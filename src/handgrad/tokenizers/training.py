"""Trains byte-level BPE on text, and adds special tokens to a tokenizer, by the `tokenizers` library.

Text is cut as Llama 3 does, which is GPT-4's rule: contractions, words, up to three digits, punctuation, white space.
A pair of tokens must stand next to each other twice to be merged. The special tokens have the last ids, as GPT-2's.
"""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import MAX_IDS, Tokenizer
from handgrad.tokenizers.ends import KNOWN
from handgrad.tokenizers.file import FileTokenizer, library_must
from handgrad.tokenizers.folder import library_of
from handgrad.tokenizers.gguf import RULES

END = KNOWN[0]
ALPHABET = 256  # bytes, each of which is a token
LEAST_COUNT = 2  # of a pair that is merged: one that is seen once says nothing about other text
RULE = "llama-bpe"


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> FileTokenizer:
    """Returns byte-level BPE of at most `vocab_size` ids, trained on `texts`; fewer where no pair is left to merge.

    special: further special tokens; <|endoftext|> is one, and the first of them

    The same texts give the same tokenizer, whatever number of threads counts them. A special token spelled out in the
    texts is plain text there. Raises HandgradError for a vocabulary without room for the bytes and special tokens, and
    for a special token that is empty, repeated or a token of the text.

    >>> tokenizer = train(["to be or not to be, to be"], 260)
    >>> [tokenizer.bytes_of(id) for id in (256, 257, 258)], tokenizer.vocab_size, tokenizer.eot
    ([b'be', b'to', b' be'], 260, 259)
    """
    special = [END, *(token for token in special if token != END)]
    least = ALPHABET + len(special)
    if not least <= vocab_size <= MAX_IDS:
        rule = f"a byte-level vocabulary has {ALPHABET} bytes and {len(special)} special tokens: {least} to {MAX_IDS:,}"
        raise HandgradError("tokenizer", rule, vocab_size)
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))  # as llama.cpp does for texts cut by this rule
    library.pre_tokenizer, library.decoder = RULES[RULE], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=LEAST_COUNT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with library_must("a tokenizer must be trained on text"):
        library.train_from_iterator(texts, trainer)
    return _with(library, special, "bpe")


def extend(tokenizer: Tokenizer, special: Sequence[str]) -> FileTokenizer:
    """Returns `tokenizer` with further special tokens, whose ids follow its own. It ends texts as before.

    Raises HandgradError for a special token that is empty, repeated or a token already.

    >>> more = extend(train(["to be"], 257), ["<|im_start|>", "<|im_end|>"])
    >>> more.vocab_size, more.eot, more.encode("a<|im_end|>", special=True).tolist()
    (259, 256, [64, 258])
    """
    library = tokenizers.Tokenizer.from_str(library_of(tokenizer).to_str())  # a copy: the caller's stays as it is
    if library.get_vocab_size() != tokenizer.vocab_size:
        rule = "a tokenizer gets further tokens if its ids have no gaps"
        raise HandgradError("tokenizer", rule, f"{library.get_vocab_size():,} of {tokenizer.vocab_size:,}")
    return _with(library, special, tokenizer.name, tokenizer.ends)


def _with(
    library: tokenizers.Tokenizer, special: Sequence[str], name: str, ends: tuple[int, ...] | None = None
) -> FileTokenizer:
    for index, token in enumerate(special):
        if not token or token in special[:index] or library.token_to_id(token) is not None:
            rule = "a special token is a text, given once, that is no token yet"
            raise HandgradError("tokenizer", rule, repr(token))
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return FileTokenizer(library, name, ends)


def measure(texts: Iterable[str], *tokenizers: Tokenizer) -> list[int]:
    """Returns the bytes of `texts` in UTF-8, and their tokens by each tokenizer.

    >>> from handgrad.tokenizers import chars, gpt2
    >>> measure(["Hello world"], gpt2(), chars("Hello world"))
    [11, 2, 11]
    """
    counts = [0] * (1 + len(tokenizers))
    for text in texts:
        found = [len(text.encode("utf-8")), *(len(tokenizer.encode(text)) for tokenizer in tokenizers)]
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    return counts
