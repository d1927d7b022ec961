"""Objective: what a window of raw ids becomes. Causal: the next token."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.tensor import IGNORE_INDEX
from handgrad.data.draws import Draws

# what stands in rows that hold no sequence; 0 in all other arrays. last -1: the row sees nothing
EMPTY = {"targets": IGNORE_INDEX, "nsp_targets": IGNORE_INDEX, "rows": -1, "last": -1}


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
        self, raw: np.ndarray, partner: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        """Returns at least the inputs `names`: int32 or float32, contiguous, in the order of the sequences.

        raw: ids of the windows, (B, raw ids in a window) int32;  partner: the same of the second windows, or None
        draw: the sequences' random numbers. A sequence must depend on its row of raw, partner and draw alone
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
        self, raw: np.ndarray, partner: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        ids = np.ascontiguousarray(raw[:, :-1])
        arrays = {"ids": ids, "targets": np.ascontiguousarray(raw[:, 1:])}
        if "first" in names or "positions" in names:
            here = np.arange(ids.shape[1], dtype=np.int32)
            first = np.maximum.accumulate(np.where(ids == self.eot, here, np.int32(0)), axis=1)
            arrays |= {"first": first, "positions": here - first}
        return arrays


def check_names(names: Collection[str], objective: Objective) -> None:
    """Raises HandgradError for the first name that the objective cannot fill."""
    *most, last = objective.inputs
    for name in names:
        if name not in objective.inputs:
            kind = type(objective).__name__
            hint = "Causal(eot=...) fills first and positions" if name in ("first", "positions") else ""
            rule = f"the objective {kind} fills the model inputs {', '.join(most)} and {last}"
            raise HandgradError("data", rule, repr(name), hint=hint)
