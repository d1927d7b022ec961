"""A family's fields and tensors as another library names and lays them out, and the way there and back.

A `Format`, which the caller gives, is that table. It serves Hugging Face's folders (io/hf.py) and GGUF (io/gguf.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.io.weights import NUMPY, Weights

DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f32"}  # float16 has fewer values than float32, and others than bf16
# keys that change what transformers makes of any family: the values that change nothing, the default first
NEUTRAL: dict[str, tuple] = {
    "attention_chunk_size": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "transformers_weights": (None, "model.safetensors"),
}


def _nothing(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its whole name, its shape and dtype there, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Format:
    """What one family is called in Hugging Face's library."""

    model_types: Mapping[str, str]
    """model_type: the class that transformers makes of it, for every one that is this family here"""
    fields: Mapping[str, tuple[str, Any]]
    """our field: (their key, its value where config.json leaves it out)"""
    aliases: Mapping[str, str]
    """another spelling of a key: the key"""
    shared: Mapping[str, tuple[tuple[str, ...], Any]]
    """our field: (their keys, which must have one value, its value where config.json leaves it out)"""
    only: Callable[[Mapping[str, Any]], Mapping[str, tuple]]
    """from our fields: their keys that change the computation, with the values that we compute, their default first"""
    names: Callable[[str], tuple[str, ...]]
    """from the name of a tensor of ours, the names of theirs that are its rows, in this order"""
    prefix: str
    """what names of tensors may lack: a file of the body alone leaves it out"""
    transposed: str
    """our tensors that are the transpose of theirs: a regular expression"""
    ignored: str
    """their tensors that we do not need, without the prefix: a regular expression"""
    tied: tuple[str, str, str]
    """our flag, and the two tensors of ours that are one where it is set: the table and the head"""
    shifted: str = "(?!)"
    """our tensors that are theirs plus 1: a regular expression"""
    rows: Callable[[str, Mapping[str, Any]], tuple[int, ...]] | None = None
    """from the name of a tensor of ours that is several of theirs, and from our fields: the rows of each"""
    order: Callable[[str, Mapping[str, Any]], Sequence[int] | None] | None = None
    """from the name of a tensor of ours and our fields: which of our rows each row of theirs is; None: the same"""
    kind: Callable[[Mapping[str, Any]], str] | None = None
    """from our fields, the model_type that is written; None: the first"""
    decode: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing
    """from config.json: our fields that `fields` and `shared` cannot give"""
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing
    """from our fields: the keys that `decode` reads"""
    renamed: Callable[[str], str] = str
    """from the name of a tensor of theirs, without the prefix, to the one that newer files give it"""
    optional: Mapping[str, str] = field(default_factory=dict)
    """our flag: a tensor of ours. A file without the tensor turns the flag off, whatever config.json says"""
    computes: frozenset[str] = frozenset()
    """keys of NEUTRAL that `decode` reads"""
    gguf: Mapping[str, Any] | None = None
    """the arguments of `io.gguf.Layout`; None: no .gguf is read or written"""

    def model_type(self, fields: Mapping[str, Any]) -> str:
        """The model_type that a model with these fields is written as."""
        return self.kind(fields) if self.kind else next(iter(self.model_types))

    def parts(self, name: str, shape: tuple[int, ...], fields: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of their tensors that a tensor of ours is made of."""
        names = self.names(name)
        rows = shape[:1] if len(names) == 1 or self.rows is None else self.rows(name, fields)
        return [(theirs, self._turn(name, (n, *shape[1:]))) for theirs, n in zip(names, rows, strict=True)]

    def config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json says of a model with these fields."""
        kind = self.model_type(fields)
        return {
            "architectures": [self.model_types[kind]],
            "model_type": kind,
            **{theirs: fields[ours] for ours, (theirs, _) in self.fields.items()},
            **{key: fields[ours] for ours, (keys, _) in self.shared.items() for key in keys},
            **self.encode(fields),
            **{key: values[0] for key, values in self.only(fields).items()},
        }

    def apart(self, weights: Weights, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) of all their tensors, read one of ours at a time."""
        for name, shape in weights.shapes.items():
            is_shifted, at = self._is_shifted(name), 0
            values = weights.tensor(name, "f32" if is_shifted else dtype)
            order = self._order(name, weights.fields)
            values = values if order is None else values[order]
            values = (values - np.float32(1)).astype(NUMPY[dtype]) if is_shifted else values
            for theirs, part in self.parts(name, shape, weights.fields):
                count = part[-1] if self._is_transposed(name) else part[0]
                rows = values[at : at + count]
                yield theirs, rows.T if self._is_transposed(name) else rows
                at += count

    def join(self, name: str, parts: list[np.ndarray], fields: Mapping[str, Any]) -> np.ndarray:
        """A tensor of ours from theirs."""
        values, order = [part.T if self._is_transposed(name) else part for part in parts], self._order(name, fields)
        if len({part.dtype for part in values}) > 1:
            values = [part.astype(np.float32) for part in values]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        whole = whole if order is None else whole[np.argsort(order)]
        # in float32: near 1, bf16 has fewer digits
        return whole.astype(np.float32) + np.float32(1) if self._is_shifted(name) else whole

    def _order(self, name: str, fields: Mapping[str, Any]) -> Sequence[int] | None:
        return self.order(name, fields) if self.order else None

    def _is_shifted(self, name: str) -> bool:
        return re.fullmatch(self.shifted, name) is not None

    def _is_transposed(self, name: str) -> bool:
        return re.fullmatch(self.transposed, name) is not None

    def _turn(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self._is_transposed(name) else shape


def read_fields(form: Format, config: dict[str, Any], where: str, source: object) -> dict[str, Any]:
    """The fields of our model that a config gives, unchecked. The config gets the main spelling of its keys.

    Raises HandgradError(where) that names the source if two keys for one field contradict each other.
    """
    for alias, key in form.aliases.items():
        if alias in config and not same(config.setdefault(key, config[alias]), config[alias]):
            got = f"{shown(config[key])} and {shown(config[alias])}"
            raise HandgradError(where, f"{source} has one value for {key} and its other name {alias}", got)
    found = {ours: config.get(theirs, default) for ours, (theirs, default) in form.fields.items()}
    for ours, (keys, default) in form.shared.items():
        values = [config.get(key, default) for key in keys]
        if not all(same(value, values[0]) for value in values):
            rule = f"{source} has one value for {', '.join(keys)}: a model here has one {ours}"
            hint = f"if you do not train, any {ours} gives the same text: set them alike"
            raise HandgradError(where, rule, ", ".join(map(shown, values)), hint=hint)
        found[ours] = values[0]
    try:
        return found | dict(form.decode(config))
    except HandgradError as error:
        raise HandgradError(where, f"{source} has {error.rule}", error.got, hint=error.hint) from None


def check_only(form: Format, config: Mapping[str, Any], fields: Mapping[str, Any], where: str, source: object) -> None:
    """Raises HandgradError(where) for a key that asks for another computation than ours."""
    neutral = {key: values for key, values in NEUTRAL.items() if key not in form.computes}
    for key, values in (neutral | dict(form.only(fields))).items():
        if not any(same(config.get(key, values[0]), value) for value in values):
            rule = f"{source} has {key} {' or '.join(str(value) for value in values)}"
            raise HandgradError(where, rule, shown(config[key]), hint="no kernel here computes another")


def read_weights(
    form: Format,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Stored],
    where: str,
    source: object,
    said: str,
    hint: str = "",
) -> Weights:
    """The model whose tensors are these, by their names without the prefix.

    Raises HandgradError(where) for a tensor that is missing, has another shape or dtype, or is none of the model that
    `said` describes (with the hint).
    """
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        for theirs, part in form.parts(name, shape, fields):
            short = theirs.removeprefix(form.prefix)
            wanted[short] = theirs, part
            parts.setdefault(name, []).append(short)
    flag, table, head = form.tied
    if fields.get(flag):
        (short,), (other,) = ([theirs.removeprefix(form.prefix) for theirs in form.names(n)] for n in (table, head))
        if short not in found and other in found:  # the tied pair is stored under its other name
            wanted[other], parts[table] = wanted.pop(short), [other]
    for short, stored in found.items():
        if short not in wanted and re.fullmatch(form.ignored, short):
            continue
        if short not in wanted:
            rule = f"{source} holds the tensors of its {said} alone"
            raise HandgradError(where, rule, f"also {shown(stored.name)}", hint=hint)
        if stored.shape != wanted[short][1]:
            raise HandgradError(where, f"{stored.name} in {source} has shape {wanted[short][1]}", stored.shape)
    for short in sorted(wanted.keys() - found.keys()):
        raise HandgradError(where, f"{source} holds the tensor {wanted[short][0]}", "no such")
    types = {found[short].dtype for short in wanted}
    if types - set(DTYPES):
        raise HandgradError(where, f"tensors in {source} are {', '.join(DTYPES)}", ", ".join(sorted(types)))

    def tensor(name: str) -> np.ndarray:
        return form.join(name, [found[short].read() for short in parts[name]], fields)

    return Weights(fields, "bf16" if types == {"BF16"} else "f32", shapes, tensor)


def same(a: object, b: object) -> bool:
    """Whether two JSON values are equal and of one type: 1 is not true, and 12.0 is not 12."""
    return type(a) is type(b) and a == b
