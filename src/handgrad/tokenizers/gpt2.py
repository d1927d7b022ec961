"""GPT-2's byte-level BPE by tiktoken, with the merges of gpt2_vocab.bpe. No network."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

from handgrad.core.errors import HandgradError
from handgrad.tokenizers.base import checked, whole_characters

MERGES = Path(__file__).with_name("gpt2_vocab.bpe")
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = 50256
# contractions; words, numbers and punctuation, each with one space before it; white space up to the last before a word
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def gpt2() -> "GPT2Tokenizer":
    """Returns GPT-2's tokenizer: 50257 ids; 50256 is <|endoftext|>.

    >>> tokenizer = gpt2()
    >>> tokenizer.encode("Hello world").tolist()
    [15496, 995]
    >>> tokenizer.decode([15496, 995])
    'Hello world'
    """
    return GPT2Tokenizer()


class GPT2Tokenizer:
    """A `handgrad.tokenizers.Tokenizer`, made by `gpt2`."""

    name = "gpt2"
    vocab_size = END_OF_TEXT + 1
    eot = END_OF_TEXT
    ends = (END_OF_TEXT,)
    begins: tuple[int, ...] = ()
    specials = ("<|endoftext|>",)

    def __init__(self) -> None:
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks=read_ranks(MERGES),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        allowed: set[str] = set(self.specials) if special else set()
        try:
            # encode_to_numpy, because encode_ordinary replaces lone surrogates instead of raising
            found = self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
            return found.astype(np.int32)
        except UnicodeEncodeError as error:
            raise HandgradError("tokenizer", "text must be Unicode", repr(text[error.start])) from None
        except ValueError:  # white space too long for the regular expression's stack: encode each half on its own
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half], special), self.encode(text[half:], special)])

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(list(checked(ids, self.vocab_size)))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        return whole_characters(self.bytes_of(id) for id in checked(ids, self.vocab_size))

    def bytes_of(self, id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(id)

    def drawable(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def save(self, folder: str | Path) -> dict:
        return {"kind": "gpt2"}

    def __reduce__(self) -> tuple[Callable[[], "GPT2Tokenizer"], tuple[()]]:
        return gpt2, ()  # unpickling in another process returns that process's own instance


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns {token bytes: id} from OpenAI's merges at `path`. Raises HandgradError if any byte of the file differs.

    The first 256 ids are the single bytes. Each line "a b" merges two earlier tokens into the next id.
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
    """Returns {character: byte}, how byte-level BPE files spell bytes, in the order of the first 256 ids.

    A byte that is printable in Latin-1 spells itself; the others take the characters from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + place): byte for place, byte in enumerate(others)}
