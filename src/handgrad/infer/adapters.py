"""Adapters on disk: between our packed tensors and peft's folders, and merged into the weights that they belong to."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.io import peft
from handgrad.io.format import Format
from handgrad.io.weights import NUMPY, Weights
from handgrad.models import Model, declare
from handgrad.models.lora import CLASSIFIER, A, Adapter, B, Lora, tensors

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
