"""Objective: what a window of raw ids becomes. Causal: the next token. Chat: the assistant's next token."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data.draws import Draws
from handgrad.data.shards import BEGINS, LEARNED

# what stands in rows that hold no sequence; 0 in all other arrays. last -1: the row sees nothing
EMPTY = {"targets": IGNORE_INDEX, "nsp_targets": IGNORE_INDEX, "rows": -1, "last": -1}


def num_targets(batch: Mapping[str, np.ndarray]) -> int:
    """Returns how many targets of a batch count: its losses are divided by this."""
    return int(np.count_nonzero(batch["targets"] != IGNORE_INDEX))


class Objective(Protocol):
    """What `Tokens` asks of an objective, a frozen dataclass. All sequences of an objective have one length."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model inputs that `fill` knows."""
        ...

    @property
    def static(self) -> bool:
        """Whether a window becomes the same in every epoch. Then epochs do not shift windows."""
        ...

    @property
    def partners(self) -> bool:
        """Whether `fill` gets a second window, of another place, for every sequence."""
        ...

    @property
    def packs(self) -> bool:
        """Whether a window holds whole rows of chat data, whose marks `fill` gets (`handgrad.data.packing`)."""
        ...

    @property
    def largest_id(self) -> int:
        """The largest id that `fill` may insert; -1 if it inserts none."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Raw ids must lie below it; None for any."""
        ...

    def window(self, seq_len: int) -> tuple[int, int]:
        """Returns (raw ids in a window, distance between the starts of two windows).

        Raises HandgradError if sequences cannot have this length.
        """
        ...

    def tokens(self, seq_len: int) -> int:
        """Returns the tokens that a model reads per sequence, those of an encoder and of a decoder: of tokens/s."""
        ...

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        """Returns at least the inputs `names`: int32 or float32, contiguous, in the order of the sequences.

        raw: ids of the windows, (B, raw ids in a window) int32
        beside: as many ids of the second windows (`partners`), or marks of the ids (`packs`); else None
        draw: the sequences' random numbers. A sequence must depend on its row of raw, beside and draw alone
        """
        ...


@dataclass(frozen=True)
class Causal:
    """Every position predicts the next token.

    ids, targets: (B, seq_len), the same ids shifted by one
    eot: the id that begins every document in the shards (the tokenizer's `eot`), if the model keeps documents apart;
        then also
    first: (B, seq_len), where the position's document begins: a position sees first .. itself of its own sequence
    positions: (B, seq_len), the position within the document

    Both count from the window's beginning if the document began before it. The end-of-text id is the first token of its
    document: it sees itself alone, and no other document sees it. Targets are the same as without `eot`: the last token
    of a document predicts the end-of-text id, as generation needs it, and nothing else of the next document.

    >>> raw = np.array([[5, 6, 0, 7, 8]], np.int32)  # two documents; 0 begins the second
    >>> arrays = Causal(eot=0).fill(raw, None, Draws(0, [0]), ["first", "positions"])
    >>> arrays["first"].tolist(), arrays["positions"].tolist()
    ([[0, 0, 2, 2]], [[0, 1, 0, 1]])
    """

    eot: int | None = None
    static: ClassVar[bool] = False
    partners: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    vocab_size: ClassVar[int | None] = None
    largest_id: ClassVar[int] = -1

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ids", "targets") if self.eot is None else ("ids", "targets", "first", "positions")

    def window(self, seq_len: int) -> tuple[int, int]:
        return seq_len + 1, seq_len

    def tokens(self, seq_len: int) -> int:
        return seq_len

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        ids = np.ascontiguousarray(raw[:, :-1])
        arrays = {"ids": ids, "targets": np.ascontiguousarray(raw[:, 1:])}
        if "first" in names or "positions" in names:
            arrays |= _bounds(ids == self.eot)
        return arrays


@dataclass(frozen=True)
class Chat:
    """Every position predicts the next token of its row if that is the assistant's, and nothing else.

    The windows are whole rows of chat data, one after another; the rest of a window is padding, of id 0 and no target.

    ids, targets: (B, seq_len), the same ids shifted by one; IGNORE_INDEX for what the assistant did not write
    first, positions: (B, seq_len), as `Causal(eot)` fills them, with rows as documents. Padding sees itself alone

    >>> raw, marks = np.array([[5, 6, 7, 8, 9]], np.int32), np.array([[2, 1, 2, 0, 1]], np.uint8)  # rows 5 6, 7 8 9
    >>> arrays = Chat().fill(raw, marks, Draws(0, [0]), ["targets", "first"])
    >>> arrays["targets"].tolist(), arrays["first"].tolist()
    ([[6, -1, -1, 9]], [[0, 0, 2, 2]])
    """

    inputs: ClassVar[tuple[str, ...]] = ("ids", "targets", "first", "positions")
    static: ClassVar[bool] = True
    partners: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    vocab_size: ClassVar[int | None] = None
    largest_id: ClassVar[int] = -1

    def window(self, seq_len: int) -> tuple[int, int]:
        return seq_len + 1, seq_len

    def tokens(self, seq_len: int) -> int:
        return seq_len

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        assert beside is not None  # the marks, as `packs` asks for
        targets = np.where(beside[:, 1:] == LEARNED, raw[:, 1:], np.int32(IGNORE_INDEX))
        arrays = {"ids": np.ascontiguousarray(raw[:, :-1]), "targets": targets}
        return arrays | _bounds(beside[:, :-1] & BEGINS > 0)


def _bounds(begins: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the inputs first and positions of texts whose documents begin at these places, (B, seq_len) bool."""
    here = np.arange(begins.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, here, np.int32(0)), axis=1)
    return {"first": first, "positions": here - first}


def check_names(names: Collection[str], objective: Objective) -> None:
    """Raises HandgradError for the first name that the objective cannot fill."""
    *most, last = objective.inputs
    for name in names:
        if name not in objective.inputs:
            kind = type(objective).__name__
            hint = "Causal(eot=...) fills first and positions" if name in ("first", "positions") else ""
            rule = f"the objective {kind} fills the model inputs {', '.join(most)} and {last}"
            raise HandgradError("data", rule, repr(name), hint=hint)
