"""Recording: the programs of a training run, and the values that its parameters start from."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from handgrad.backends.arena import NUMPY
from handgrad.backends.base import Arena
from handgrad.core.backward import POLICIES, backward
from handgrad.core.dtypes import F32, DType
from handgrad.core.errors import HandgradError
from handgrad.core.params import Param
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.io.weights import Weights
from handgrad.models import Model, forward_loss
from handgrad.ops import add
from handgrad.ops.adamw.reference import split_weight
from handgrad.optim import AdamW, record_step
from handgrad.train.llmc_init import draws

AHEAD, MOST = 4, 16  # parameters a thread that may be drawn before they are written: most are vectors; threads
Parts = dict[str, np.ndarray]  # a parameter's values by flat vector


def record_train(
    model: Model,
    optim: AdamW,
    micro_batch: int,
    seq_len: int,
    dtype: DType,
    *,
    chunks: int,
    recompute: str = "act",
    accumulates: bool = False,
    grad_dtype: DType = F32,
    master: bool = True,
) -> Program:
    """The list of one step: forward, backward | norm | update.

    chunks: pieces of the head.  accumulates: a step has several micro-batches.
    """
    if recompute not in POLICIES:
        raise HandgradError("train", f"recompute is one of {', '.join(POLICIES)}", f"'{recompute}'")
    if seq_len > model.max_seq_len:
        raise HandgradError(
            "train",
            f"the model reads at most {model.max_seq_len} tokens",
            f"seq_len {seq_len}",
            hint="--model.max-seq-len",
        )
    p = Program(dtype, trains=True, accumulates=accumulates, grad_dtype=grad_dtype, master=master)
    forward_loss(p, model, micro_batch, seq_len, chunks)
    backward(p, add, drop=POLICIES[recompute])
    record_step(p, optim)
    return p


def record_loss(model: Model, micro_batch: int, seq_len: int, dtype: DType, chunks: int) -> Program:
    """The list of one evaluation batch."""
    p = Program(dtype)
    forward_loss(p, model, micro_batch, seq_len, chunks)
    return p


def chunks_of(rows: int, head_chunks: int, head_rows: int) -> int:
    """The number of pieces of the head; 0 asks for pieces of at most `head_rows` rows."""
    if head_chunks < 0 or head_chunks > rows:
        raise HandgradError("train", f"head_chunks lies between 1 and the {rows} rows of a micro-batch", head_chunks)
    return head_chunks or -(-rows // head_rows)


def initialize(p: Program, arena: Arena, seed: int, init: str | Weights | Iterator[Parts] = "random") -> None:
    """Writes the initial weights.

    init: "random" draws them in float32, each parameter from its own stream of the seed; "llmc" as llm.c's GPU trainer
    does, whatever the seed; Weights are those of a model on disk, which must have the same shapes; else what `drawing`
    gave before
    """
    if isinstance(init, Weights):
        copy(p, arena, init)
        return
    if init == "llmc":
        for info, values in draws(p):
            write_weight(arena, info.tensor, values)
        return
    if init == "random":
        init = drawing(p, seed, "low" in arena.plan.vectors)
    if not isinstance(init, Iterator):
        raise HandgradError("train", "weights start as 'random', 'llmc', or a model on disk", repr(init))
    for info, parts in zip(p.params.values(), init, strict=True):
        for flat, values in parts.items():
            arena.write_part(flat, info.tensor, values)


def copy(p: Program, arena: Arena, weights: Weights) -> None:
    """Writes the weights of a model on disk, one tensor after another."""
    for name in sorted(p.params.keys() ^ weights.shapes.keys()):
        raise HandgradError("train", "the model to start from has the same tensors", f"'{name}' in one of them alone")
    for name, shape in weights.shapes.items():
        own, padded = p.params[name].tensor, p.params[name].init.rows is not None
        rows = own.shape[0]
        if own.shape != ((max(rows, shape[0]), *shape[1:]) if padded else shape):
            raise HandgradError("train", f"the model to start from has '{name}' of {own.shape}", shape)
        write_weight(arena, own, weights.tensor(name, "f32", rows))


def drawing(p: Program, seed: int, halves: bool) -> Iterator[Parts]:
    """Starts threads that draw random weights, and gives them in order; numpy leaves Python to others meanwhile."""
    threads, todo = min(len(os.sched_getaffinity(0)), MOST), enumerate(p.params.values())
    pool, work = ThreadPoolExecutor(threads), lambda item: split(draw(item[1], seed, item[0]), halves)
    begun = deque(pool.submit(work, item) for item in islice(todo, AHEAD * threads))  # not all: they are whole copies

    def results() -> Iterator[Parts]:
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(work, item) for item in islice(todo, 1))

    return results()


def draw(info: Param, seed: int, stream: int) -> np.ndarray:
    """The initial values of one parameter, float32."""
    values = (np.ones if info.init.kind == "ones" else np.zeros)(info.tensor.shape, np.float32)
    if info.init.kind == "normal":
        rows, rng = values[: info.init.rows], np.random.default_rng([seed, stream])
        rng.standard_normal(dtype=np.float32, out=rows)
        rows *= np.float32(info.init.std)
    return values


def split(values: np.ndarray, halves: bool) -> Parts:
    """What is written of float32 values: two halves where the plan has low ones, else the nearest that it holds."""
    if not halves:
        return {"param": values}
    high, low = split_weight(np.ascontiguousarray(values, np.float32))
    return {"param": high.astype(NUMPY["bf16"]), "low": low}


def write_weight(arena: Arena, param: Tensor, values: np.ndarray) -> None:
    """Sets a parameter from float32 values."""
    for flat, part in split(values, "low" in arena.plan.vectors).items():
        arena.write_part(flat, param, part)
