"""The initial weights of llm.c's GPU trainer: torch's Mersenne twister and normal_ on a CPU, without torch.

torch makes 16 numbers from 16 words at a time. If a count is no multiple of 16, it draws the last 16 again from new
words. Below 16 it makes pairs of numbers from two uniforms of 53 bits, in float64.
"""

from collections.abc import Iterator

import numpy as np

from handgrad.backends.cpu.library import library
from handgrad.core.errors import HandgradError
from handgrad.core.params import Param
from handgrad.core.program import Program
from handgrad.io import llmc

SEED = 42
BLOCK = 16
PIECE = BLOCK << 16  # numbers computed at a time: their words stay in cache


class Twister:
    """The stream of normal numbers that torch draws on a CPU after manual_seed(seed)."""

    def __init__(self, seed: int = SEED):
        self._words = np.random.RandomState(seed)  # numpy's oldest generator is seeded like torch's

    def normal(self, count: int, std: float) -> np.ndarray:
        """`count` draws from N(0, std^2), float32."""
        if count < BLOCK:
            return self._pairs(count, std)
        out, whole = np.empty(count, np.float32), count - count % BLOCK
        for at in range(0, whole, PIECE):
            self._fill(out[at : min(at + PIECE, whole)], std)
        if whole < count:
            self._draw(count - whole)  # torch draws these and does not use them
            self._fill(out[-BLOCK:], std)
        return out

    def _draw(self, count: int) -> np.ndarray:
        return self._words.randint(0, 1 << 32, count, np.uint32)

    def _fill(self, out: np.ndarray, std: float) -> None:
        words = self._draw(out.size)
        library().normal(out.ctypes.data, words.ctypes.data, out.size // BLOCK, std)

    def _pairs(self, count: int, std: float) -> np.ndarray:
        words = self._draw(4 * -(-count // 2)).astype(np.uint64).reshape(-1, 2, 2)
        uniform = (words @ np.array([1 << 32, 1], np.uint64) & np.uint64((1 << 53) - 1)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * np.pi * uniform[:, 0]
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1) * std
        return values.reshape(-1)[:count].astype(np.float32)


def draws(p: Program) -> Iterator[tuple[Param, np.ndarray]]:
    """Every parameter of a GPT-2 with its initial values, float32, drawn in the order in which the model uses them.

    Rows of padding are 0. The smaller standard deviation of the residual projections is rounded as in llm.c, for many
    depths one bit off the nearest float32. Raises HandgradError for a model with other parameters.
    """
    layers = sum(name.endswith(".attn.c_proj.weight") for name in p.params)
    for name in sorted(set(llmc.names(layers)) ^ p.params.keys()):
        got = f"a model {'with' if name in p.params else 'without'} '{name}'"
        hint = "other models start with init 'random'"
        raise HandgradError("train", "llm.c's initial weights are those of a GPT-2 with a tied head", got, hint=hint)
    return _draws(p, layers)


def _draws(p: Program, layers: int) -> Iterator[tuple[Param, np.ndarray]]:
    twister = Twister()
    std = np.float32(0.02)
    projected = std * (np.float32(1) / np.sqrt(np.float32(2 * layers)))
    for name, info in p.params.items():
        values = np.full(info.tensor.shape, 1.0 if info.init.kind == "ones" else 0.0, np.float32)
        if info.init.kind == "normal":
            rows = values[: info.init.rows]
            own = projected if name.endswith("c_proj.weight") else std
            rows[...] = twister.normal(rows.size, float(own)).reshape(rows.shape)
        yield info, values
