"""Adapters on disk: between our packed tensors and peft's folders, and merged into the weights that they belong to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.io import peft
from handgrad.io.format import Format
from handgrad.io.weights import NUMPY, Weights
from handgrad.models import Model, declare
from handgrad.models.lora import CLASSIFIER, A, Adapter, B, Lora, tensors

SAMPLED, ALIKE = 4, 32  # weights of a sample; values of each: the smallest block of a quantised type
Read = Callable[[str], np.ndarray]  # a tensor of ours by name


def merged(base: Weights, lora: Lora, model: Model, read: Read) -> Weights:
    """The weights W + scale B A, float32 where a weight has an adapter."""
    adapters = lora.adapters(model)

    def sum_of(name: str) -> np.ndarray:
        values = base.read(name)
        if name not in adapters:
            return values
        a, values = adapters[name], values.astype(np.float32)
        down, up = (read(tensor).astype(np.float32) for tensor in tensors(name))
        for i, ((at, count), rows) in enumerate(zip(a.spans, _rows(a))):
            values[at : at + count] += np.float32(a.scale) * (up[rows] @ down[i * a.rank : (i + 1) * a.rank])
        return values

    return replace(base, read=sum_of)


def write_peft(folder: Path, lora: Lora, model: Model, read: Read, dtype: str, base: str) -> None:
    """Writes the adapters alone into a folder, as peft does.

    dtype: of the tensors, "f32" or "bf16";  base: the model that they belong to, as transformers loads it
    """
    if any(name.startswith(CLASSIFIER) for name in declare(model).params):
        rule = "an adapter alone holds no classifier, which has learned beside it"
        raise HandgradError("lora", rule, f"a {model.family} with labels", hint="convert without --adapter: merged")
    places = _places(lora, model)
    shapes = {theirs: shape for theirs, shape, *_ in places}
    values = (read(ours)[rows].astype(NUMPY[dtype], copy=False) for _, _, ours, rows in places)
    targets = tuple(sorted({module.rpartition(".")[2] for a in lora.adapters(model).values() for module in a.modules}))
    settings = peft.Settings(lora.rank, lora.alpha, lora.dropout, targets, base)
    peft.write(folder, settings, "CAUSAL_LM" if model.continues_text else None, shapes, values, dtype)
    peft.write_base(folder, sample(lora, model, read))


def sample(lora: Lora, model: Model, read: Read) -> dict[str, np.ndarray]:
    """The first values of the first row of a few weights that have adapters, by name: they tell a model from others."""
    names = list(lora.adapters(model))
    chosen = {names[i * (len(names) - 1) // (SAMPLED - 1)] for i in range(SAMPLED)}
    return {name: read(name)[0, :ALIKE].astype(np.float64) for name in names if name in chosen}


def check_base(folder: Path, lora: Lora, model: Model, read: Read | None, init: str) -> None:
    """Raises HandgradError if an adapter was trained on other weights than those that it is now to change.

    read: the weights; None: they are drawn. Then it may be of a run whose weights were drawn, too
    init: what the error calls them

    Copies of weights in two types are the same weights, quantised ones of 4 bits and more included. Not seen are
    differences as small as 8 bits round, and those in weights that are not among the samples.
    """
    wanted, base = peft.read_base(folder), peft.read_settings(folder).base
    if wanted is None or (read is None and not base):
        return
    held = sample(lora, model, read) if read else {}
    if wanted.keys() == held.keys() and is_same([wanted[name] for name in held], list(held.values())):
        return
    rule = f"'{folder}' is an adapter of " + (f"the model '{base}'" if base else "a model that it does not name")
    hint = f"if it is on purpose, delete {folder / peft.BASE}"
    raise HandgradError("lora", rule, f"other weights of the same shapes, --init {init}", hint=hint)


def is_same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    """Whether two lists of samples are of the same weights, each rounded to some type.

    A type of 8 bits or more rounds by less than 1/128 of the largest value of a block, two of them by 1/64. Fewer bits
    have few levels in a block, and round by a step at most: the smallest distance of two values. The types whose blocks
    share scales clip some values, so a quarter may differ by more.
    """
    if any(a.shape != b.shape for a, b in zip(one, other)):
        return False
    far = [np.abs(a - b) > np.abs(a).max() / 64 + step(a) + step(b) for a, b in zip(one, other)]
    return float(np.mean(np.concatenate(far))) <= 0.25


def step(values: np.ndarray) -> float:
    """The smallest distance of two different values; 0 if there is one value."""
    return float(np.diff(np.unique(values)).min()) if np.ptp(values) else 0.0


def lora_of(folder: Path) -> Lora:
    """The Lora that an adapter of peft's describes."""
    s = peft.read_settings(folder)
    try:
        return Lora(s.rank, s.alpha, s.targets, s.dropout)
    except HandgradError as error:
        raise HandgradError("lora", f"{folder} has an adapter whose {error.rule}", error.got) from None


def read_peft(folder: Path, lora: Lora, model: Model) -> dict[str, np.ndarray]:
    """The tensors of an adapter of peft's by our names, packed. Raises HandgradError for one of another model."""
    places = _places(lora, model)
    theirs = peft.read(folder, {name: shape for name, shape, *_ in places})
    found = {}
    for weight, a in lora.adapters(model).items():
        for name, shape in zip(tensors(weight), ((a.rank * len(a.spans), -1), (a.rows, a.rank))):
            mine = [(theirs[place], rows) for place, _, ours, rows in places if ours == name]
            whole = np.empty((shape[0], mine[0][0].shape[1]), np.float32)
            for values, rows in mine:
                whole[rows] = values
            found[name] = whole
    return found


def _places(lora: Lora, model: Model) -> list[tuple[str, tuple[int, ...], str, np.ndarray]]:
    """(peft's name, shape, our tensor, which of its rows) of every tensor of an adapter."""
    if not model.hugging_face:
        raise HandgradError("lora", f"Hugging Face's library has no model of the family '{model.family}'")
    form, fields, params = Format(**model.hugging_face), asdict(model), declare(model).params
    found: list[tuple[str, tuple[int, ...], str, np.ndarray]] = []
    for weight, a in lora.adapters(model).items():
        down, up = tensors(weight)
        order = form.order(weight, fields) if form.order else None
        for i, (module, rows) in enumerate(zip(a.modules, _rows(a))):
            own = np.arange(rows.start, rows.stop) if order is None else np.asarray(order)
            K = params[weight].tensor.shape[1]
            found.append((f"{module}.{A}", (a.rank, K), down, np.arange(i * a.rank, (i + 1) * a.rank)))
            found.append((f"{module}.{B}", (own.size, a.rank), up, own))
    return found


def _rows(a: Adapter) -> Iterator[slice]:
    """The rows of B of every span."""
    at = 0
    for _, count in a.spans:
        yield slice(at, at + count)
        at += count
