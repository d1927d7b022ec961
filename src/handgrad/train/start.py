"""Start: the values that the parameters of a run begin with."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from handgrad.backends.arena import NUMPY
from handgrad.backends.base import Arena
from handgrad.core.errors import HandgradError
from handgrad.core.limits import cpus
from handgrad.core.number import whole
from handgrad.core.params import Param
from handgrad.core.program import Program
from handgrad.core.tensor import Tensor
from handgrad.io.weights import Weights
from handgrad.models.lora import adapter_params
from handgrad.ops.adamw.reference import join_weight, split_weight
from handgrad.optim.ema import EMA
from handgrad.optim.schedule_free import ITERATE
from handgrad.train.llmc_init import draws

PREFETCH = 4  # parameters drawn ahead, per thread: most are vectors
MAX_THREADS = 16
COPIES = (EMA, ITERATE)  # flat vectors that start as the weights
Parts = dict[str, np.ndarray]  # a parameter's values by flat vector


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    seed   of random weights and of dropout
    adapter  values of adapters by name, in place of drawn ones, for a run that has some
    init   "random" draws the weights in float32, each parameter from its own stream of the seed; "llmc" draws those of
           llm.c's GPU trainer, whatever the seed; Weights are those of a model on disk (`infer.load.open_source`)

    Raises HandgradError for another word.
    """

    seed: int = 0
    init: str | Weights = "random"
    adapter: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("train", "seed", self.seed))
        if not isinstance(self.init, Weights) and self.init not in ("random", "llmc"):
            raise HandgradError("train", "weights start as 'random', 'llmc', or a model on disk", repr(self.init))


def initialize(p: Program, arena: Arena, start: Start, drawn: Iterator[Parts] | None = None) -> None:
    """Writes the initial weights. `drawn`: the iterator from `drawing`, if it was started earlier.

    Raises HandgradError where a model on disk has other tensors or shapes.
    """
    own = adapter_params(p)
    if isinstance(start.init, Weights):
        copy(p, arena, start.init, own)
        for stream, (name, info) in enumerate(p.params.items()):
            if name in own:
                write_weight(arena, info.tensor, draw(info, start.seed, stream))
    elif start.init == "llmc":
        for info, values in draws(p):
            write_weight(arena, info.tensor, values)
    else:
        drawn = drawn or drawing(p, start.seed, "low" in arena.plan.vectors)
        for info, parts in zip(p.params.values(), drawn, strict=True):
            write_parts(arena, info.tensor, parts)
    for name in own & start.adapter.keys():
        write_weight(arena, p.params[name].tensor, start.adapter[name])


def copy(p: Program, arena: Arena, weights: Weights, others: Collection[str] = ()) -> None:
    """Writes the weights of a model on disk, one tensor after another. others: parameters that it lacks."""
    for name in sorted((p.params.keys() - set(others)) ^ weights.shapes.keys()):
        raise HandgradError("train", "the model to start from has the same tensors", f"'{name}' in one of them alone")
    for name, shape in weights.shapes.items():
        own, padded = p.params[name].tensor, p.params[name].init.rows is not None
        rows = own.shape[0]
        if own.shape != ((max(rows, shape[0]), *shape[1:]) if padded else shape):
            raise HandgradError("train", f"the model to start from has '{name}' of {own.shape}", shape)
        write_weight(arena, own, weights.tensor(name, "f32", rows))


def drawing(p: Program, seed: int, splits: bool) -> Iterator[Parts]:
    """Starts threads that draw random weights; returns them in order. numpy lets other threads run meanwhile.

    splits: give bf16 and the low 16 bits, as `Precision.splits_weights` says
    """
    threads, todo = min(cpus(), MAX_THREADS), enumerate(p.params.values())
    pool, work = ThreadPoolExecutor(threads), lambda item: split(draw(item[1], seed, item[0]), splits)
    begun = deque(pool.submit(work, item) for item in islice(todo, PREFETCH * threads))  # not all: they are copies

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
        first, std = info.init.first or (0, 0.0)
        rows[:first] *= np.float32(std)
        rows[first:] *= np.float32(info.init.std)
    if info.init.kind == "uniform":
        bound, rng = np.float32(info.init.std), np.random.default_rng([seed, stream])
        values = (2 * rng.random(info.tensor.shape, np.float32) - 1) * bound
    return values


def split(values: np.ndarray, splits: bool) -> Parts:
    """What is written of float32 values: bf16 and low 16 bits if `splits`, else the values unchanged."""
    if not splits:
        return {"param": values}
    high, low = split_weight(np.ascontiguousarray(values, np.float32))
    with np.errstate(invalid="ignore"):  # a model on disk may hold NaN, which a checkpoint refuses by name
        return {"param": high.astype(NUMPY["bf16"]), "low": low}


def write_weight(arena: Arena, param: Tensor, values: np.ndarray) -> None:
    """Sets a parameter from float32 values."""
    write_parts(arena, param, split(values, has_low(arena, param)))


def write_parts(arena: Arena, param: Tensor, parts: Parts) -> None:
    """Writes a parameter's slices of flat vectors. Low halves are dropped where the optimizer keeps none: the high half
    is the nearest bf16. COPIES start as the weights; a frozen parameter has none."""
    for vector in COPIES:
        if vector in arena.plan.vectors and arena.plan.vectors[vector].covers(param):
            write_copy(arena, vector, param, parts["param"], parts.get("low"))
    for vector, values in parts.items():
        if vector != "low" or has_low(arena, param):
            arena.write_part(vector, param, values)


def write_copy(arena: Arena, vector: str, param: Tensor, values: np.ndarray, low: np.ndarray | None) -> None:
    """Writes a parameter's slice of a float32 flat vector: its weights, joined with their low halves if there are."""
    whole = values.astype(np.float32)  # before they are joined: the result has the type of the upper half
    arena.write_part(vector, param, whole if low is None else join_weight(whole, low))


def has_low(arena: Arena, param: Tensor) -> bool:
    """Whether the optimizer keeps the low 16 bits of a parameter."""
    return "low" in arena.plan.vectors and arena.plan.vectors["low"].covers(param)
