"""Model and Batch: what every family offers, what its body reads, and functions that record or list a whole model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from handgrad.core.dtypes import F32, I32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor

NONE: Mapping[str, Any] = {}  # no adapters
USUAL_SEQ_LEN = 2048  # where a model reads far longer texts than most people train on
MAX_LAYERS = 1024  # bounds the time to record a model whose size comes from a damaged file


@dataclass(frozen=True)
class Batch:
    """Input handles of one micro-batch, declared by `Model.inputs`.

    The data fill each handle with the array of its name. A family that reads more (positions, document bounds, token
    types, a source text) adds an optional handle here.
    """

    ids: Tensor  # (batch_size * seq_len,) i32, row by row
    batch_size: int
    seq_len: int
    cache: int = 0  # tokens in the key/value cache of each sequence; 0: no cache
    # the keys of its own sequence that a row sees, (batch_size * seq_len,) i32; None: all, or all up to itself
    first: Tensor | None = None
    last: Tensor | None = None
    types: Tensor | None = None  # (batch_size * seq_len,) i32, which of two texts a token belongs to
    source: Tensor | None = None  # i32, the ids that an encoder reads, batch_size texts of one length
    source_last: Tensor | None = None  # (batch_size * seq_len,) i32, the last token of its source that a row sees
    rows: Tensor | None = None  # i32, the rows that the head predicts, -1 for none; None: all
    documents: bool = False  # a sequence holds several, which `first` keeps apart: positions begin anew at each


class Model(Protocol):
    """A model of some family: a frozen dataclass of sizes whose methods append calls to a program.

    `body` and the head (`loss`, `logits`) are apart: the caller decides what follows the body, and may run the head on
    rows that it picks. What they record depends on the fields, the batch and `Program.trains`, on nothing else.

    family: the name in checkpoints;  hugging_face: the arguments of `io.format.Format`, empty if Hugging Face's library
    has no such family
    special_tokens: what the last ids of the vocabulary are, beyond those of the data; a BERT's may be its tokenizer's
    continues_text: whether it predicts the next token, so that it generates and scores texts
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # what makes a class a dataclass to `fields` and `asdict`
    family: ClassVar[str]
    hugging_face: ClassVar[Mapping[str, Any]]
    special_tokens: ClassVar[tuple[str, ...]]
    continues_text: ClassVar[bool]

    @property
    def vocab_size(self) -> int:
        """Tokens; every id lies below it."""
        ...

    @property
    def vocab_padded(self) -> int:
        """Columns of the logits: vocab_size and padding, which never counts."""
        ...

    @property
    def max_seq_len(self) -> int:
        """The most tokens of one sequence."""
        ...

    @property
    def usual_seq_len(self) -> int:
        """Tokens of a sequence, and of a key/value cache, where the user does not say: max_seq_len, or less where that
        is far more than most texts have."""
        ...

    def predictions(self, seq_len: int) -> int:
        """Rows that the head predicts in a sequence of so many tokens."""
        ...

    def inputs(self, g: Program, batch_size: int, seq_len: int, *, cache: int = 0) -> Batch:
        """Declares the inputs that the body reads. cache: tokens in each sequence's key/value cache, 0 for no cache."""
        ...

    def body(self, g: Program, data: Batch) -> Tensor:
        """Records everything before the head; returns its rows (N, C) in the working dtype."""
        ...

    def loss(self, g: Program, x: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
        """Records the head on rows x (N, C) and marks its losses as the output "losses"; returns them.

        targets: (N,) i32, IGNORE_INDEX for a row that does not count;  chunks: pieces that the logits are computed in

        The losses (N,) f32 are nats. In a program that trains, they start the gradients of x and of the head.
        """
        ...

    def logits(self, g: Program, x: Tensor) -> Tensor:
        """Records the head on rows x (N, C); returns the logits (N, vocab_padded), the output "logits"."""
        ...

    def flops_per_token(self, num_params: int, seq_len: int) -> int:
        """FLOP of forward and backward per token, as the family's MFU counts them.

        num_params: all parameters of the program. What is recomputed in backward does not count.
        """
        ...


@runtime_checkable
class EncoderDecoder(Model, Protocol):
    """A model that reads a source once and then writes a text about it. Generation asks for what is below.

    With a cache, `inputs` declares the decoder's alone, and `body` reads the states that `encode` writes.
    """

    @property
    def start_id(self) -> int:
        """The id that a decoder reads first."""
        ...

    @property
    def end_id(self) -> int:
        """The id that ends a source, and what the decoder writes."""
        ...

    @property
    def marks(self) -> Mapping[str, int]:
        """Ids of the model's own tokens that a text may hold, by the names that stand for them."""
        ...

    def encode(self, g: Program, batch_size: int) -> None:
        """Records the encoder over the inputs "source" and "source_last" (batch_size * max_seq_len,), and writes what
        decoders read of it into states. A source that is shorter is padded; source_last is the place of its last
        token."""
        ...


# whole models ---------------------------------------------------------------------------------------------------------


def forward_loss(
    g: Program,
    model: Model,
    batch_size: int,
    seq_len: int,
    chunks: int = 1,
    documents: bool = False,
    logits: bool = False,
) -> Tensor:
    """Records inputs, body and losses; the input "targets" has as many rows as the body returns.

    documents: sequences hold several, which the input "first" keeps apart. Raises HandgradError for a model that does
        not continue texts
    logits: also record these, for a head that is small
    """
    if documents and not model.continues_text:
        raise HandgradError("model", "documents are kept apart by models that continue texts", f"a {model.family}")
    data = model.inputs(g, batch_size, seq_len)
    if documents:
        data = replace(data, first=g.input("first", data.ids.shape, I32), documents=True)
    x = model.body(g, data)
    if logits:
        model.logits(g, x)
    return model.loss(g, x, g.input("targets", x.shape[:1], I32), chunks)


def forward_logits(g: Program, model: Model, batch_size: int, seq_len: int, *, cache: int = 0) -> Tensor:
    """Records inputs, body and logits."""
    return model.logits(g, model.body(g, model.inputs(g, batch_size, seq_len, cache=cache)))


def declare(model: Model, dtype: DType = F32, adapters: Mapping[str, Any] = NONE) -> Program:
    """A program of one token, body and head, that declares every parameter in the order of use. It is never run.

    adapters: see `Program.adapters`

    >>> from handgrad.models import GPT2
    >>> len(declare(GPT2(num_layers=1)).params)
    16
    """
    g = Program(dtype, adapters=adapters)
    forward_logits(g, model, 1, 1)
    return g


def shapes(g: Program) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without rows of padding."""
    tensors = {name: (info.tensor.shape, info.init.rows) for name, info in g.params.items()}
    return {name: (rows or shape[0], *shape[1:]) for name, (shape, rows) in tensors.items()}


def keys_seen(seq_len: int, window: int = 0) -> float:
    """Keys that a token of a sequence sees in causal attention, on average: half of them, or fewer within a window.

    >>> keys_seen(16), keys_seen(16, window=4)
    (8.0, 3.5)
    """
    window = min(window or seq_len, seq_len)
    return window - window**2 / (2 * seq_len)  # the first `window` tokens see fewer


# fields ---------------------------------------------------------------------------------------------------------------


def padded(vocab_size: int) -> int:
    """Rows of a table of so many tokens: a multiple of 128, as GEMMs want. Padding starts at zero and never counts."""
    return -(-vocab_size // 128) * 128


def size(default: int, most: int = 2**31 - 1, least: int = 1) -> Any:
    """A field of a model: a whole number from `least` to `most`."""
    return _field(
        default,
        ("is a whole number", lambda value: type(value) is int),
        (f"is at least {least}", lambda value: value >= least),
        (f"is at most {most:,}", lambda value: value <= most),
    )


def rate(default: float) -> Any:
    """A field of a model: a probability below 1."""
    return _field(
        default,
        ("is a number", lambda value: type(value) in (int, float)),
        ("lies in [0, 1)", lambda value: 0 <= value < 1),
    )


def number(default: float) -> Any:
    """A field of a model: a positive number."""
    return _field(default, ("is a positive number", _is_positive))


def numbers(count: int) -> Any:
    """A field of a model: None, or so many positive numbers."""

    def holds(value: Any) -> bool:
        return value is None or (type(value) in (tuple, list) and len(value) == count and all(map(_is_positive, value)))

    return _field(None, (f"is None, or {count} positive numbers", holds))


def names(least: int, most: int) -> Any:
    """A field of a model: no names, or so many, each once."""

    def holds(value: Any) -> bool:
        is_list = type(value) in (tuple, list) and all(type(name) is str for name in value)
        return is_list and len(value) in (0, *range(least, most + 1)) and len(set(value)) == len(value)

    return _field((), (f"is a list of {least} to {most:,} names, each once, or empty", holds))


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def choice(default: str, *words: str) -> Any:
    """A field of a model: one of these words."""
    return _field(default, (f"is one of {', '.join(words)}", lambda value: value in words))


def flag(default: bool) -> Any:
    """A field of a model: true or false."""
    return _field(default, ("is true or false", lambda value: type(value) is bool))


def _field(default: Any, *rules: tuple[str, Callable[[Any], bool]]) -> Any:
    """A dataclass field with rules for its value, of which the first broken one is reported."""
    return field(default=default, metadata={"rules": rules})


def check_fields(model: Any) -> None:
    """Raises HandgradError for a field of another type or out of bounds. Every family's `__post_init__` calls it first.

    Fields may come from a damaged file: the bounds keep recording cheap whatever it holds.
    """
    for f in fields(model):
        value = getattr(model, f.name)
        for rule, holds in f.metadata["rules"]:
            if not holds(value):
                raise HandgradError("model", f"{f.name} {rule}", repr(value))


def head_columns(model: Any) -> int:
    """Columns of a head: the field head_size, or hidden_size / num_heads where there is none or it is 0.

    Raises HandgradError if the heads do not divide the width.
    """
    heads, width = model.num_heads, model.hidden_size
    own: int = getattr(model, "head_size", 0)
    if not own and width % heads:
        raise HandgradError("model", "hidden_size is a multiple of num_heads", f"{width} and {heads} heads")
    return own or width // heads


def check_heads(model: Any) -> None:
    """Raises HandgradError unless groups of query heads share a key head, and rotary positions turn all columns."""
    if model.num_heads % model.num_kv_heads:
        hint = "give num_kv_heads, too: a preset's stays where num_heads changes"
        raise HandgradError("model", f"num_kv_heads divides the {model.num_heads} heads", model.num_kv_heads, hint=hint)
    if model.head_size % 2:
        raise HandgradError("model", "head_size is even: its columns are rotated in pairs", model.head_size)
