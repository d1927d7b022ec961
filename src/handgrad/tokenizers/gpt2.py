"""GPT-2's byte-level BPE, from the merges beside this file; tiktoken does the work. No network."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import checked, whole_characters
from handgrad.tokenizers.words import Words

MERGES = Path(__file__).with_name("gpt2_vocab.bpe")
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = 50256
_SHORT = 2048  # characters; the library is faster below
# contractions; words, numbers and other signs with the space before them; spaces that end the text or precede one more
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def gpt2() -> "GPT2Tokenizer":
    """Returns GPT-2's tokenizer: 50257 ids, of which 50256 ends a document.

    >>> tokenizer = gpt2()
    >>> tokenizer.encode("Hello world").tolist()
    [15496, 995]
    >>> tokenizer.decode([15496, 995])
    'Hello world'
    """
    return GPT2Tokenizer()


class GPT2Tokenizer:
    """See `handgrad.tokenizers.Tokenizer`; made by `gpt2`."""

    name = "gpt2"
    vocab_size = END_OF_TEXT + 1
    eot = END_OF_TEXT

    def __init__(self):
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks=read_ranks(MERGES),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
            explicit_n_vocab=self.vocab_size,
        )
        self._words = Words(self._ask_for_few, self.eot)

    def encode(self, text: str) -> np.ndarray:
        return self._ask(text) if len(text) < _SHORT else self.encode_documents([text])[1:]

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        try:
            return self._words.encode(texts)
        except UnicodeEncodeError as error:
            raise HandgradError("tokenizer", "text must be Unicode", repr(error.object[error.start])) from None

    def _ask(self, text: str) -> np.ndarray:
        """Returns the library's ids of `text`, (n,) int32."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError as error:
            raise HandgradError("tokenizer", "text must be Unicode", repr(text[error.start])) from None
        except ValueError:  # the pattern gives up on hundreds of thousands of spaces in a row: cut there, once
            half = len(text) // 2
            return np.concatenate([self._ask(text[:half]), self._ask(text[half:])])

    def _ask_for_few(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text) if len(text) < _SHORT else self._ask(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(list(checked(ids, self.vocab_size)))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        return whole_characters(self.bytes_of(id) for id in checked(ids, self.vocab_size))

    def bytes_of(self, id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(id)

    def save(self, folder: str | Path) -> dict:
        return {"kind": "gpt2"}

    def __reduce__(self):
        return gpt2, ()  # another process makes its own


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns {token bytes: id} from the merges at `path`, which must be OpenAI's file to the byte.

    A line "a b" merges two earlier tokens into the next id, after the 256 single bytes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise HandgradError("tokenizer", f"{path} must be readable", error.strerror) from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        rule = f"{path} must be GPT-2's merges (sha256 {SHA256[:8]}...)"
        raise HandgradError("tokenizer", rule, f"{digest[:8]}...", hint="install handgrad again")
    byte_of = spelled_bytes()
    ranks = {bytes([byte]): id for id, byte in enumerate(byte_of.values())}
    for line in raw.decode("utf-8").splitlines()[1:]:
        token = bytes(byte_of[character] for character in line.replace(" ", ""))
        ranks[token] = len(ranks)
    return ranks


def spelled_bytes() -> dict[str, int]:
    """Returns {character: byte}: how files of byte-level BPE spell a byte, in the order of the first 256 ids.

    A byte is itself if it is printable in Latin-1, else the next free character from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + place): byte for place, byte in enumerate(others)}
