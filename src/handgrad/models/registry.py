"""Families by name, and a model as the dictionary that a checkpoint's run.json keeps."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.json_file import shown
from handgrad.models.model import Model

FAMILIES: dict[str, type[Model]] = {}
UNNAMED = "gpt2"  # the family of checkpoints that name none
LATER: dict[str, Any] = {"labels": ()}  # fields that earlier checkpoints lack, with what they mean

Family = TypeVar("Family", bound=type[Model])


def register(cls: Family) -> Family:
    """Registers a family under its `family` name: the decorator of its dataclass."""
    if cls.family in FAMILIES:
        raise HandgradError("model", "every family has a name of its own", f"'{cls.family}' twice")
    for other in FAMILIES.values():
        for model_type in _model_types(cls) & _model_types(other):
            raise HandgradError("model", f"{other.family} reads Hugging Face's '{model_type}'", f"'{cls.family}' too")
    FAMILIES[cls.family] = cls
    return cls


def family(name: object) -> type[Model]:
    """The family of this name. Raises HandgradError for an unknown one."""
    if not isinstance(name, str) or name not in FAMILIES:
        hint = _named_otherwise(name.lower()) if isinstance(name, str) else ""
        raise HandgradError("model", f"a family is one of {', '.join(FAMILIES)}", repr(name), hint=hint)
    return FAMILIES[name]


def create(name: object, values: Mapping[str, Any]) -> Model:
    """The model of this family with these fields.

    Raises HandgradError for an unknown family, a field that it lacks, and a value out of range.
    """
    cls = family(name)
    known = [f.name for f in fields(cls)]
    for field in values:
        if field not in known:
            raise HandgradError("model", f"a model of the family {name} has {', '.join(known)}", f"'{field}'")
    return cls(**values)


def family_of_model_type(model_type: object, source: object) -> type[Model]:
    """The family that Hugging Face's library calls by this name. Raises HandgradError that names the source."""
    types = {name: cls for cls in FAMILIES.values() for name in cls.hugging_face.get("model_types", ())}
    if not isinstance(model_type, str) or model_type not in types:
        raise HandgradError("hf", f"{source} has the model_type {' or '.join(types)}", repr(model_type))
    return types[model_type]


def family_of_architecture(architecture: str, source: object) -> type[Model]:
    """The family that llama.cpp calls by this name. Raises HandgradError that names the source."""
    layouts = {cls: cls.hugging_face.get("gguf") or {} for cls in FAMILIES.values()}
    types = {name: cls for cls, layout in layouts.items() for name in layout.get("architectures", {}).values()}
    if architecture not in types:
        raise HandgradError("gguf", f"{source} has the architecture {' or '.join(types)}", shown(architecture))
    return types[architecture]


def _model_types(cls: type[Model]) -> set[str]:
    return set(cls.hugging_face.get("model_types", ()))


def _named_otherwise(word: str) -> str:
    """The hint for a model that Hugging Face's library calls by this name, or by one that begins with it."""
    types = {
        name: cls.family for cls in FAMILIES.values() for name in _model_types(cls) if word and name.startswith(word)
    }
    return f"{min(types)} is of the family {types[min(types)]}" if types else did_you_mean(word, FAMILIES)


def to_dict(model: Model) -> dict[str, Any]:
    """The family and fields of a model, as `from_dict` reads them.

    >>> from handgrad.models import GPT2
    >>> saved = to_dict(GPT2(num_layers=3))
    >>> saved["family"], saved["model"]["num_layers"], from_dict(saved, "generate", "run.json") == GPT2(num_layers=3)
    ('gpt2', 3, True)
    """
    return {"family": model.family, "model": asdict(model)}


def from_dict(saved: Mapping[str, Any], where: str, source: object) -> Model:
    """The model of {"family": name, "model": fields}. Raises HandgradError(where) that names the source."""
    try:
        cls = family(saved.get("family", UNNAMED))
    except HandgradError as error:
        raise HandgradError(where, f"{source} gives a family, one of {', '.join(FAMILIES)}", error.got) from None
    known = [f.name for f in fields(cls)]
    values = {name: LATER[name] for name in known if name in LATER} | saved["model"]
    for name in known + list(values):
        if (name in known) != (name in values):
            got = f"{'no ' if name in known else ''}{name!r}"
            raise HandgradError(where, f"{source} gives {', '.join(known)}", got)
    return build_from_file(cls, values, where, source)


def build_from_file(cls: type[Model], values: Mapping[str, Any], where: str, source: object) -> Model:
    """cls(**values) of what a file says. Raises HandgradError(where) that names the source."""
    try:
        return cls(**values)
    except HandgradError as error:
        raise HandgradError(where, f"{source} gives a model whose {error.rule}", error.got) from None
