"""Labels: texts, or pairs of texts, and the class of each, which a BERT learns to tell."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.draws import Draws
from handgrad.data.masked import bounds


@dataclass(frozen=True, kw_only=True)
class Labels:
    """[CLS] text [SEP] and padding, or [CLS] a [SEP] b [SEP], and its class, from shards that `prepare_labels` wrote.

    ids: (B, seq_len);  types: (B, seq_len), 1 for b and its [SEP], else 0
    first, last: (B, seq_len), as of Masked: a token sees its text, padding sees nothing
    targets: (B,), the index of the text's label
    values: (B,) float32, of a regression, the number that this index stands for

    cls_id, sep_id, pad_id: ids of [CLS], [SEP] and [PAD];  count: labels, or numbers
    record: ids of a text in the shards: the index of its label, its ids, pad_id up to here. A longer text was cut
    pairs: a record holds two texts, with one pad_id between them
    numbers: of a regression, by their index

    Raises HandgradError where a shard holds no such record.

    >>> objective = Labels(cls_id=2, sep_id=3, pad_id=0, count=2, record=5)
    >>> arrays = objective.fill(np.array([[1, 7, 8, 0, 0]], np.int32), None, Draws(0, [0]), objective.inputs)
    >>> arrays["ids"].tolist(), arrays["last"][0].tolist(), arrays["targets"].tolist()
    ([[2, 7, 8, 3, 0, 0]], [3, 3, 3, 3, 3, 3], [1])
    """

    cls_id: int
    sep_id: int
    pad_id: int
    count: int
    record: int
    pairs: bool = False
    numbers: tuple[float, ...] = ()
    static: ClassVar[bool] = True  # a window is a text
    partners: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    vocab_size: ClassVar[int | None] = None

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ("ids", "types", "first", "last", "targets")
        return (*names, "values") if self.numbers else names

    @property
    def largest_id(self) -> int:
        return max(self.cls_id, self.sep_id, self.pad_id)

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence: those of a record, [CLS] and [SEP] for the label."""
        return self.record + 1

    def window(self, seq_len: int) -> tuple[int, int]:
        if seq_len != self.seq_len:
            hint = "handgrad data labels --seq-len makes others"
            raise HandgradError("data", f"these labelled texts have seq_len {self.seq_len}", seq_len, hint=hint)
        return self.record, self.record

    def tokens(self, seq_len: int) -> int:
        return seq_len

    def fill(
        self, raw: np.ndarray, beside: np.ndarray | None, draw: Draws, names: Collection[str]
    ) -> dict[str, np.ndarray]:
        labels, text = raw[:, 0], raw[:, 1:]
        if self.pairs:  # rows without a sequence are zeros; a record has an id of padding between its texts
            text = np.where(raw.any(axis=1, keepdims=True), text, np.int32(self.pad_id))
        inside, here = text != self.pad_id, np.arange(self.seq_len, dtype=np.int32)
        end = inside.sum(axis=1, keepdims=True, dtype=np.int32) + np.int32(self.pairs)  # of all ids in the record
        first = np.argmin(inside, axis=1, keepdims=True) if self.pairs else end  # of the only or first text
        wanted = (here[:-2] < end) & (here[:-2] != first)
        if (labels >= self.count).any() or (inside != wanted).any():
            rule = f"a record of the shards is one of {self.count} labels, {'two texts' if self.pairs else 'a text'},"
            hint = "handgrad data labels --replace makes them again"
            raise HandgradError("data", f"{rule} and padding", "another", hint=hint)
        ids = np.full((len(raw), self.seq_len), self.pad_id, np.int32)
        ids[:, 0], ids[:, 1:-1] = self.cls_id, text
        np.put_along_axis(ids, np.concatenate([first, end], axis=1) + 1, np.int32(self.sep_id), axis=1)
        types = ((here > first + 1) & (here < end + 2)).astype(np.int32)
        arrays = {"ids": ids, "types": types, "targets": labels.astype(np.int32)}
        if self.numbers:
            arrays["values"] = np.array(self.numbers, np.float32)[labels]
        return arrays | bounds(end + np.int32(2), self.seq_len)
