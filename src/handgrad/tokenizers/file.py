"""Any tokenizer.json, through the `tokenizers` library: byte-level and other BPE, Unigram, WordPiece."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import checked
from handgrad.tokenizers.gpt2 import spelled_bytes

FILE = "tokenizer.json"
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "</s>", "[SEP]")  # by model family


def from_file(path: str | Path) -> "FileTokenizer":
    """Returns the tokenizer that the tokenizer.json at `path` describes.

    Its `eot` is the first of <|endoftext|>, <|end_of_text|>, <|im_end|>, <eos>, </s>, [SEP] in its vocabulary, else
    None. The file's padding, truncation and added special tokens are turned off: the data loader cuts training text.
    Raises HandgradError if the file is missing or invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise HandgradError("tokenizer", "a tokenizer must be a tokenizer.json file", f"no file {path}")
    with library_must(f"{path} must describe a tokenizer"):
        return FileTokenizer(tokenizers.Tokenizer.from_file(str(path)), path.name)


@contextmanager
def library_must(rule: str) -> Iterator[None]:
    """Re-raises whatever the library raises in the block as a HandgradError with this rule."""
    try:
        yield
    except (HandgradError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises Exception, and its panics derive from BaseException
        reason = " ".join(str(error).split())  # one line, even if it quotes a damaged file
        raise HandgradError("tokenizer", rule, reason) from None


class FileTokenizer:
    """A `handgrad.tokenizers.Tokenizer`, made by `from_file`. `library` is the `tokenizers.Tokenizer` behind it."""

    def __init__(self, library: tokenizers.Tokenizer, name: str):
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # as plain text
        known = library.get_vocab(with_added_tokens=True)
        if not known:
            raise ValueError("it has no tokens")
        self.name = name
        self.vocab_size = max(known.values()) + 1  # ids may have gaps
        self.eot = next((known[end] for end in _ENDS if end in known), None)
        self.library, self._spelled = library, spelled_bytes()

    def encode(self, text: str) -> np.ndarray:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HandgradError("tokenizer", "text must be Unicode", repr(text[error.start])) from None
        with library_must(f"{self.name} must be able to encode the text"):
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

    def save(self, folder: str | Path) -> dict:
        with library_must(f"{folder} must be writable"):
            self.library.save(str(Path(folder) / FILE))
        return {"kind": "file", "path": FILE}
