"""Weights: a GPT-2 in a file, whoever wrote it: sizes, and tensors by our names, each read when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from handgrad.core.errors import HandgradError

NUMPY = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
PADDED = ("wte.weight", "lm_head.weight")  # a row for every token; a format may append rows of zeros
ALIGN = 128  # what our checkpoints and llm.c's files round the rows of a vocabulary up to
SIZES = ("vocab_size", "max_seq_len", "num_layers", "num_heads", "hidden_size")
# of a block, in the order of llm.c's files: name, shape in units of the width
BLOCK = {
    "ln_1.weight": (1,),
    "ln_1.bias": (1,),
    "attn.c_attn.weight": (3, 1),
    "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1),
    "attn.c_proj.bias": (1,),
    "ln_2.weight": (1,),
    "ln_2.bias": (1,),
    "mlp.c_fc.weight": (4, 1),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (1, 4),
    "mlp.c_proj.bias": (1,),
}


@dataclass(frozen=True)
class Weights:
    """A GPT-2 in a file.

    sizes: the fields of models.GPT2, without dropout
    dtype: "f32" or "bf16", of the tensors
    read: name -> tensor. A table of the vocabulary has vocab_size rows, or more
    """

    sizes: dict[str, Any]
    dtype: str
    read: Callable[[str], np.ndarray]

    def tensor(self, name: str, dtype: str | None = None, rows: int | None = None) -> np.ndarray:
        """Returns a tensor in `dtype` (as it is read if None), rounded to nearest, ties to even.

        rows: of a vocabulary's table: this many, zeros past vocab_size; None: vocab_size
        """
        values = self.read(name)
        values = values if dtype is None else values.astype(NUMPY[dtype], copy=False)
        if name not in PADDED:
            return values
        values = values[: self.sizes["vocab_size"]]
        return np.pad(values, ((0, (rows or len(values)) - len(values)), (0, 0)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, tables without padding."""
        return shapes(self.sizes)


def shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a GPT-2 of these sizes, tables without padding.

    >>> sizes = dict(vocab_size=5, max_seq_len=4, num_layers=1, num_heads=1, hidden_size=2, tie_embeddings=True)
    >>> len(shapes(sizes)), shapes(sizes)["h.0.mlp.c_fc.weight"]
    (16, (8, 2))
    """
    c = sizes["hidden_size"]
    table = {"wte.weight": (sizes["vocab_size"], c), "wpe.weight": (sizes["max_seq_len"], c)}
    for i in range(sizes["num_layers"]):
        table |= {f"h.{i}.{name}": tuple(c * n for n in units) for name, units in BLOCK.items()}
    table |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    return table if sizes["tie_embeddings"] else table | {"lm_head.weight": (sizes["vocab_size"], c)}


def padded(vocab_size: int) -> int:
    """Rows of a table of the vocabulary with its padding."""
    return -(-vocab_size // ALIGN) * ALIGN


def check_sizes(sizes: dict[str, Any], where: str, path: object) -> None:
    """Raises HandgradError for sizes that no GPT-2 has."""
    for name in SIZES:
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise HandgradError(where, f"{path} gives {name} as a number from 1 on", repr(sizes[name]))
    if sizes["hidden_size"] % sizes["num_heads"]:
        got = f"{sizes['hidden_size']} and {sizes['num_heads']} heads"
        raise HandgradError(where, f"{path} gives a hidden_size that is a multiple of num_heads", got)
