"""Any tokenizer.json, and BERT's vocab.txt, through the `tokenizers` library: BPE, Unigram, WordPiece."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers

from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError, one_line
from handgrad.tokenizers.base import MAX_IDS, Tokenizer, checked
from handgrad.tokenizers.ends import CONFIG, ends_of, known_ends, read_if_there
from handgrad.tokenizers.gpt2 import spelled_bytes
from handgrad.tokenizers.wordpiece import continuing, word_piece

FILE = "tokenizer.json"
# Bounds of a tokenizer.json, which the library reads in up to 2 s and 500 MB. That of Gemma, the largest vocabulary in
# use (262,144 tokens, 514,906 merges), has 33 MB, 320,000 colons and 1.4 million commas.
MOST_BYTES, MOST_COLONS, MOST_COMMAS = 48 << 20, 1 << 19, 1 << 21


def from_file(path: str | Path) -> "FileTokenizer":
    """Returns the tokenizer that the tokenizer.json, or BERT's vocab.txt, at `path` describes.

    The files beside it say which tokens end a text (`ends_of`). The file's padding, truncation and added special tokens
    are turned off: the data loader cuts training text. Raises HandgradError if the file is missing or invalid.
    """
    path = Path(path)
    library = read_library(path)
    return FileTokenizer(library, path.name, ends_of(path.parent, vocabulary(library, path)))


def read_library(path: Path) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer of a tokenizer.json, or of a vocab.txt with the settings beside it.

    Raises HandgradError if it is missing or invalid.
    """
    if not os.path.isfile(path):
        raise HandgradError("tokenizer", "a tokenizer must be a tokenizer.json or vocab.txt file", f"no file {path}")
    if path.stat().st_size > MOST_BYTES:
        raise HandgradError("tokenizer", f"{path} must have at most {MOST_BYTES:,} bytes", f"{path.stat().st_size:,}")
    with library_must(f"{path} must describe a tokenizer"):
        raw = path.read_bytes()
        if path.suffix == ".txt":
            return word_piece(raw.decode("utf-8"), read_if_there(path.parent / CONFIG), path)
        for sign, most, what in ((b":", MOST_COLONS, "keys"), (b",", MOST_COMMAS, "items")):
            if raw.count(sign) > most:
                raise HandgradError("tokenizer", f"{path} must hold at most {most:,} {what}", f"{raw.count(sign):,}")
        return tokenizers.Tokenizer.from_buffer(raw)


def vocabulary(library: tokenizers.Tokenizer, source: object) -> dict[str, int]:
    """Returns the id of every token. Raises HandgradError naming the source if an id is too large or given twice."""
    known = library.get_vocab(with_added_tokens=True)
    if not known:
        raise HandgradError("tokenizer", f"{source} must describe a tokenizer", "no tokens")
    if max(known.values()) >= MAX_IDS:
        raise HandgradError("tokenizer", f"ids in {source} must lie below {MAX_IDS:,}", f"{max(known.values()):,}")
    if len(set(known.values())) < len(known):
        got = f"{len(known):,} tokens and {len(set(known.values())):,} ids"
        raise HandgradError("tokenizer", f"{source} must give every token an id of its own", got)
    return known


def begins_of(library: tokenizers.Tokenizer, source: object) -> tuple[int, ...]:
    """Returns the ids that the library puts before a text; none if it puts others after it, as BERT's does: objectives
    and models of whole texts do that on their own.

    Raises HandgradError naming the source if one is no id of the vocabulary.
    """
    about = {} if library.post_processor is None else json.loads(library.post_processor.__getstate__())
    steps = [step for step in about.get("processors", [about]) if step.get("type") == "TemplateProcessing"]
    pieces = steps[0]["single"] if steps else []
    if not pieces or "Sequence" not in pieces[-1]:
        return ()
    named = [
        steps[0]["special_tokens"][piece["SpecialToken"]["id"]] for piece in pieces[:-1] if "Sequence" not in piece
    ]
    ids = tuple(id for token in named for id in token["ids"])
    if any(library.id_to_token(id) is None for id in ids):
        raise HandgradError("tokenizer", f"{source} puts tokens of its vocabulary before a text", f"the ids {ids}")
    return ids


def added_ids(tokenizer: object) -> set[int]:
    """Returns the ids of the tokens that were added to a tokenizer's vocabulary, special or not."""
    return set(tokenizer.library.get_added_tokens_decoder()) if isinstance(tokenizer, FileTokenizer) else set()


def put_before(library: tokenizers.Tokenizer, token: str) -> None:
    """Makes the library put a token of its vocabulary before every text."""
    before = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [before, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {"id": token, "ids": [library.token_to_id(token)], "tokens": [token]}
    state = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {token: ids}}
    processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1")
    processor.__setstate__(json.dumps(state).encode())  # its constructor takes no token with a colon or a space
    library.post_processor = processor


@contextmanager
def library_must(rule: str) -> Iterator[None]:
    """Re-raises whatever the library raises in the block as a HandgradError with this rule."""
    try:
        yield
    except (HandgradError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises Exception, and its panics derive from BaseException
        raise HandgradError("tokenizer", rule, one_line(error)) from None


class FileTokenizer:
    """A `handgrad.tokenizers.Tokenizer`, made by `from_file`. `library` is the `tokenizers.Tokenizer` behind it.

    ends: the ids that end a text; None: as a tokenizer.json alone lets one guess
    """

    def __init__(self, library: tokenizers.Tokenizer, name: str, ends: tuple[int, ...] | None = None):
        library.no_padding()
        library.no_truncation()
        known = vocabulary(library, name)
        self.name = name
        self.vocab_size = max(known.values()) + 1  # ids may have gaps
        self.ends = known_ends(known) if ends is None else ends
        self.eot = self.ends[0] if self.ends else None
        self.begins = begins_of(library, name)
        self.specials = tuple(t.content for t in library.get_added_tokens_decoder().values() if t.special)
        self.library, self._spelled = library, spelled_bytes()

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HandgradError("tokenizer", "text must be Unicode", repr(text[error.start])) from None
        with library_must(f"{self.name} must be able to encode the text"):
            self.library.encode_special_tokens = not special  # as plain text; a copy in another process forgets it
            return np.array(self.library.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        with library_must(f"{self.name} must be able to decode the ids"):
            return self.library.decode(list(checked(ids, self.vocab_size)), skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        # an id's text depends on the ids before it (a space, a partial character): decode both, yield the difference
        shown: list[int] = []
        pending: list[int] = []
        for id in checked(ids, self.vocab_size):
            pending.append(id)
            text = self._after(shown, pending)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text
                shown, pending = pending, []
        if pending:
            yield self._after(shown, pending)

    def bytes_of(self, id: int) -> bytes:
        token = self.library.id_to_token(id)
        if token is None:  # a gap in the ids
            return b""
        if isinstance(self.library.decoder, tokenizers.decoders.ByteLevel) and self._spelled.keys() >= set(token):
            return bytes(self._spelled[character] for character in token)
        return self.decode([id]).encode()

    def _after(self, shown: list[int], pending: list[int]) -> str:
        return self.decode(shown + pending)[len(self.decode(shown)) :]

    def drawable(self) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[list(self.library.get_vocab(with_added_tokens=True).values())] = True
        return found

    def save(self, folder: str | Path) -> dict:
        write_text(Path(folder) / FILE, self.library.to_str(pretty=True))
        guessed = known_ends(self.library.get_vocab(with_added_tokens=True))
        return {"kind": "file", "path": FILE} | ({} if self.ends == guessed else {"eot": list(self.ends)})


def special_ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, int] | None:
    """Returns the ids of these special tokens; None unless the tokenizer has them all.

    >>> from handgrad.tokenizers import chars
    >>> special_ids(chars("abc"), ["[MASK]"]) is None
    True
    """
    if not isinstance(tokenizer, FileTokenizer):
        return None
    found = {token: tokenizer.library.token_to_id(token) for token in tokens}
    known = {token: id for token, id in found.items() if id is not None}
    return known if len(known) == len(found) else None


def continuations(tokenizer: Tokenizer) -> np.ndarray:
    """Returns which ids continue the word before them, (vocab_size,) bool. HandgradError if it is no WordPiece."""
    found = continuing(tokenizer.library) if isinstance(tokenizer, FileTokenizer) else None
    if found is None:
        rule = "whole words are known of WordPiece, whose pieces begin with ##"
        raise HandgradError("tokenizer", rule, tokenizer.name)
    return found
