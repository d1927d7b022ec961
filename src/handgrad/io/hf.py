"""Hugging Face's folders: config.json and model.safetensors, in one file or in several with an index.

A `Format`, which the caller gives, says what a family's fields and tensors are called there. Tokenizer files are the
business of `handgrad.tokenizers`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from handgrad.core.errors import HandgradError
from handgrad.core.install import install
from handgrad.io.weights import Weights

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FILES = (CONFIG, "model*.safetensors", INDEX, "tokenizer*.json", "vocab.json", "merges.txt")  # what a download needs
DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f32"}  # float16 has fewer values than float32, and others than bf16


@dataclass(frozen=True)
class Format:
    """What one family is called in these folders."""

    model_type: str
    architecture: str
    """the class that transformers makes of it"""
    fields: Mapping[str, tuple[str, Any]]
    """our field: (their key, its value where config.json leaves it out)"""
    written: Mapping[str, str]
    """their key: our field that it is written from; such keys are not read"""
    only: Callable[[Mapping[str, Any]], Mapping[str, tuple]]
    """from our fields: their keys that change the computation, with the values that we compute, their default first"""
    name: Callable[[str], str]
    """from the name of a tensor of ours, theirs"""
    prefix: str
    """what names of tensors may lack: a file of the body alone leaves it out"""
    transposed: str
    """our tensors that are the transpose of theirs: a regular expression"""
    ignored: str
    """their tensors that we do not need, without the prefix: a regular expression"""

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor of ours is the transpose of theirs."""
        return re.fullmatch(self.transposed, name) is not None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of a tensor of ours."""
        return shape[::-1] if self.is_transposed(name) else shape


def download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, from the hub's cache or downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = f"{install('hub')}, or give a local folder"
        raise HandgradError("hf", f"hf:{name} needs the package huggingface_hub", "none", hint=hint) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, the disk, the hub's answers
        reason = " ".join(str(error).split())
        hint = "a local folder needs no network"
        raise HandgradError(
            "hf", f"hf:{name} can be downloaded", f"{type(error).__name__}: {reason}", hint=hint
        ) from None


def is_folder(path: Path) -> bool:
    """Whether a folder holds a model as Hugging Face's libraries describe it."""
    return (path / CONFIG).is_file() and "model_type" in _json(path / CONFIG)


def model_type(path: Path) -> object:
    """What a folder says that its model is."""
    return _json(path / CONFIG).get("model_type")


def read_fields(path: Path, form: Format) -> dict[str, Any]:
    """The fields of our model that config.json gives, unchecked."""
    config = _json(path / CONFIG)
    return {ours: config.get(theirs, default) for ours, (theirs, default) in form.fields.items()}


def read(path: Path, form: Format, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The model in a folder. Raises HandgradError if our kernels do not compute it, or a tensor is missing.

    fields: all of the model's, as it was built from `read_fields`;  shapes: of its tensors, without padding
    """
    config = _json(path / CONFIG)
    for key, values in form.only(fields).items():
        if config.get(key, values[0]) not in values:
            rule = f"{path / CONFIG} has {key} {' or '.join(str(value) for value in values)}"
            raise HandgradError("hf", rule, config[key], hint="no kernel here computes another")
    found = _tensors(path)
    names = {form.name(name).removeprefix(form.prefix): name for name in shapes}
    places, types = {}, set()
    for theirs, (file, handle) in found.items():
        name = theirs.removeprefix(form.prefix)
        if name not in names and re.fullmatch(form.ignored, name):
            continue
        if name not in names:
            raise HandgradError("hf", f"{path} holds the tensors of its {CONFIG} alone", f"also {theirs}")
        header = _readable(file, handle.get_slice, theirs)
        shape, wanted = tuple(header.get_shape()), form.shape(names[name], shapes[names[name]])
        if shape != wanted:
            raise HandgradError("hf", f"{theirs} in {path} has shape {wanted}", shape)
        places[names[name]] = file, handle, theirs
        types.add(header.get_dtype())
    for name in sorted(shapes.keys() - places.keys()):
        raise HandgradError("hf", f"{path} holds the tensor {form.name(name)}", "no such")
    if types - set(DTYPES):
        raise HandgradError("hf", f"tensors in {path} are {', '.join(DTYPES)}", ", ".join(sorted(types)))

    def tensor(name: str) -> np.ndarray:
        file, handle, theirs = places[name]
        values = _readable(file, handle.get_tensor, theirs)
        return values.T if form.is_transposed(name) else values

    return Weights(fields, "bf16" if types == {"BF16"} else "f32", shapes, tensor)


def write(path: Path, form: Format, weights: Weights, dtype: str | None = None, eot: int | None = None) -> None:
    """Writes config.json and model.safetensors into a folder that exists.

    dtype: "f32", "bf16", or None for the weights' own;  eot: the token that ends a text
    """
    dtype, fields = dtype or weights.dtype, weights.fields
    config = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        **{theirs: fields[ours] for ours, (theirs, _) in form.fields.items()},
        **{key: values[0] for key, values in form.only(fields).items()},
        **{theirs: fields[ours] for theirs, ours in form.written.items()},
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in weights.shapes.items():
        size = int(np.prod(shape)) * {"f32": 4, "bf16": 2}[dtype]
        header[form.name(name)] = {
            "dtype": dtype.upper(),
            "shape": form.shape(name, shape),
            "data_offsets": (at, at + size),
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / MODEL).open("wb") as file:  # tensor by tensor: no second copy of the model in memory
        file.write(len(text).to_bytes(8, "little") + text)
        for name in weights.shapes:
            values = weights.tensor(name, dtype)
            values = values.T if form.is_transposed(name) else values
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _tensors(path: Path) -> dict[str, tuple[Path, Any]]:
    """Every tensor of a folder: (the file that it lies in, open)."""
    found: dict[str, tuple[Path, Any]] = {}
    for file in _files(path):
        handle = _readable(file, safe_open, file, "np", backend="pread")
        found |= {name: (file, handle) for name in _readable(file, handle.keys)}
    return found


def _files(path: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if not (path / INDEX).is_file():
        if not (path / MODEL).is_file():
            old = (path / "pytorch_model.bin").is_file()
            hint = "transformers' save_pretrained writes it from pytorch_model.bin" if old else ""
            raise HandgradError("hf", f"{path} holds {MODEL} or {INDEX}", "neither", hint=hint)
        return [path / MODEL]
    names = _json(path / INDEX).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else {None}
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise HandgradError("hf", f"{path / INDEX} says in which file beside it a tensor is", "no such weight_map")
    return [path / name for name in sorted(names)]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HandgradError("hf", f"{path} is JSON", error) from None
    if not isinstance(found, dict):
        raise HandgradError("hf", f"{path} holds an object", type(found).__name__)
    return found


def _readable(path: Path, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return read(*args, **kwargs)
    except (OSError, SafetensorError) as error:
        raise HandgradError("hf", f"{path} is a whole safetensors file", " ".join(str(error).split())) from None
