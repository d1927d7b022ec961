"""Hugging Face's folders: config.json and model.safetensors, in one file or in several with an index.

A `Format`, which the caller gives, says what a family's fields and tensors are called there. Tokenizer files are the
business of `handgrad.tokenizers`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from handgrad.core.disk import flush, write_text
from handgrad.core.errors import HandgradError, one_line
from handgrad.core.install import install_command
from handgrad.core.json_file import read_object, shown
from handgrad.io.weights import Weights

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
TOKENIZER = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
FILES = (CONFIG, GENERATION, ADAPTER, "model*.safetensors", INDEX, *TOKENIZER)  # what a download needs
DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f32"}  # float16 has fewer values than float32, and others than bf16
MOST_HEADER = 8 << 20  # bytes of a safetensors header; 1,024 layers take 2 MB, and the format allows a slow 100 MB
LOGIN = "hf auth login, with a token that may write"
ROWS = 4096  # of two tables that are compared: their float32 copies stay below 100 MB
# keys that change what transformers makes of any family: the values that change nothing, the default first
NEUTRAL: dict[str, tuple] = {
    "attention_chunk_size": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "transformers_weights": (None, MODEL),
}


@dataclass(frozen=True)
class Format:
    """What one family is called in these folders."""

    model_type: str
    architecture: str
    """the class that transformers makes of it"""
    fields: Mapping[str, tuple[str, Any]]
    """our field: (their key, its value where config.json leaves it out)"""
    aliases: Mapping[str, str]
    """another spelling of a key: the key"""
    shared: Mapping[str, tuple[tuple[str, ...], Any]]
    """our field: (their keys, which must have one value, its value where config.json leaves it out)"""
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
    tied: tuple[str, str, str]
    """our flag, and the two tensors of ours that are one where it is set: the table and the head"""

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor of ours is the transpose of theirs."""
        return re.fullmatch(self.transposed, name) is not None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of a tensor of ours."""
        return shape[::-1] if self.is_transposed(name) else shape


def download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, from the hub's cache or downloaded."""
    hub = _hub(f"hf:{name}", "give a local folder")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, the disk, the hub's answers
        reason, hint = _reason(error), "a local folder needs no network"
        if type(error).__name__ == "LocalEntryNotFoundError":
            reason = "no answer from the hub, and no copy in its cache"
        raise HandgradError("hf", f"hf:{name} can be downloaded", reason, hint=hint) from None


def check_push(name: str) -> None:
    """Raises HandgradError unless `push` can begin: the package, a possible name, and a token. Uses no network."""
    hub = _hub(f"hf:{name}", "leave out the upload")
    try:
        hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise HandgradError("hf", "a model on the hub is called hf:OWNER/NAME or hf:NAME", _reason(error)) from None
    if not hub.get_token():
        raise HandgradError("hf", f"an upload to hf:{name} needs a token of the hub", "none", hint=LOGIN)


def push(name: str, paths: Sequence[Path], private: bool = False) -> str:
    """Uploads a folder, or files, into a repository of the hub, which is made if there is none; returns its address.

    private: make a new repository private. Raises HandgradError if anything fails; what is on disk stays as it is.
    """
    hub = _hub(f"hf:{name}", "leave out the upload")
    try:
        repo = hub.create_repo(name, private=private or None, exist_ok=True)
        for path in paths:
            if path.is_dir():
                hub.upload_folder(repo_id=repo.repo_id, folder_path=path)
            else:
                hub.upload_file(repo_id=repo.repo_id, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # of the network, the hub's answers, the disk
        code = getattr(getattr(error, "response", None), "status_code", None)
        hint = LOGIN if code in (401, 403) else "what was written here is complete; --force writes and uploads again"
        raise HandgradError("hf", f"{paths[0]} can be uploaded to hf:{name}", _reason(error), hint=hint) from None
    return str(repo)


def _hub(name: str, otherwise: str) -> Any:
    """The package that speaks with the hub."""
    try:
        import huggingface_hub
    except ImportError:
        hint = f"{install_command('hub')}, or {otherwise}"
        raise HandgradError("hf", f"{name} needs the package huggingface_hub", "none", hint=hint) from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    """An error of a library as one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def is_folder(path: Path) -> bool:
    """Whether a folder holds a model as Hugging Face's libraries describe it."""
    return (path / CONFIG).is_file() and "model_type" in read_object(path / CONFIG, "hf")


def model_type(path: Path) -> object:
    """What a folder says that its model is."""
    return read_object(path / CONFIG, "hf").get("model_type")


def read_fields(path: Path, form: Format) -> dict[str, Any]:
    """The fields of our model that a folder gives, unchecked.

    As in transformers, a head that differs from the table is used although config.json ties them. Raises HandgradError
    where two keys for one field contradict each other.
    """
    config = read_object(path / CONFIG, "hf")
    for alias, key in form.aliases.items():
        if alias in config and not _same(config.setdefault(key, config[alias]), config[alias]):
            got = f"{shown(config[key])} and {shown(config[alias])}"
            raise HandgradError("hf", f"{path / CONFIG} has one value for {key} and its other name {alias}", got)
    found = {ours: config.get(theirs, default) for ours, (theirs, default) in form.fields.items()}
    for ours, (keys, default) in form.shared.items():
        values = [config.get(key, default) for key in keys]
        if not all(_same(value, values[0]) for value in values):
            rule = f"{path / CONFIG} has one value for {', '.join(keys)}: a model here has one {ours}"
            hint = f"if you do not train, any {ours} gives the same text: set them alike"
            raise HandgradError("hf", rule, ", ".join(map(shown, values)), hint=hint)
        found[ours] = values[0]
    flag, *pair = form.tied
    if found[flag] is True:
        tensors = _tensors(path, form)
        table, head = (tensors.get(form.name(name).removeprefix(form.prefix)) for name in pair)
        found[flag] = table is None or head is None or _equal(table, head)
    return found


def read(path: Path, form: Format, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The model in a folder. Raises HandgradError if our kernels do not compute it, or a tensor is missing.

    fields: all of the model's, as it was built from `read_fields`;  shapes: of its tensors, without padding

    The stored tensors say what the dtype is, whatever config.json calls it.
    """
    config = read_object(path / CONFIG, "hf")
    for key, values in (NEUTRAL | dict(form.only(fields))).items():
        if not any(_same(config.get(key, values[0]), value) for value in values):
            rule = f"{path / CONFIG} has {key} {' or '.join(str(value) for value in values)}"
            raise HandgradError("hf", rule, shown(config[key]), hint="no kernel here computes another")
    if (path / ADAPTER).exists():
        hint = "merge it into the weights with peft's merge_and_unload"
        raise HandgradError("hf", f"'{path}' holds a whole model", f"{ADAPTER} of an adapter", hint=hint)
    found = _tensors(path, form)
    names = {form.name(name).removeprefix(form.prefix): name for name in shapes}
    flag, table, head = form.tied
    if fields.get(flag) and form.name(table).removeprefix(form.prefix) not in found:
        names[form.name(head).removeprefix(form.prefix)] = table  # the tied pair is stored under its other name
    places, types = {}, set()
    for name, (file, handle, theirs) in found.items():
        if name not in names and re.fullmatch(form.ignored, name):
            continue
        if name not in names:
            kind = shown(config.get("architectures"))
            hint = "" if form.architecture in kind else f"{form.architecture} is read here; this is {kind}"
            rule = f"{path} holds the tensors of its {CONFIG} alone"
            raise HandgradError("hf", rule, f"also {shown(theirs)}", hint=hint)
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


def write(
    path: Path,
    form: Format,
    weights: Weights,
    dtype: str | None = None,
    ends: Sequence[int] = (),
    suppressed: Sequence[int] = (),
) -> None:
    """Writes config.json, model.safetensors and, if it has something to say, generation_config.json into a folder.

    dtype: "f32", "bf16", or None for the weights' own;  ends: the tokens that end a text
    suppressed: ids that `generate` of transformers must not draw
    """
    dtype, fields = dtype or weights.dtype, weights.fields
    end = {
        "bos_token_id": ends[0] if ends else None,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
    }
    config = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        **{theirs: fields[ours] for ours, (theirs, _) in form.fields.items()},
        **{key: fields[ours] for ours, (keys, _) in form.shared.items() for key in keys},
        **{key: values[0] for key, values in form.only(fields).items()},
        **end,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
    }
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")
    if suppressed:
        end["suppress_tokens"] = list(suppressed)
    if ends or suppressed:
        write_text(path / GENERATION, json.dumps(end, indent=2) + "\n")
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
        file.flush()
        os.fsync(file.fileno())
    flush(path)


def _same(a: object, b: object) -> bool:
    """Whether two JSON values are equal and of one type: 1 is not true, and 12.0 is not 12."""
    return type(a) is type(b) and a == b


# tensors: (the file that it lies in, the open file, its name there)
Place = tuple[Path, Any, str]


def _tensors(path: Path, form: Format) -> dict[str, Place]:
    """Every tensor of a folder, by its name without the prefix. As in transformers, one whole file precedes an index.

    Raises HandgradError if a file is missing, two tensors share a name, or the index says another file than it is.
    """
    index = None if (path / MODEL).is_file() else _index(path)
    found: dict[str, Place] = {}
    for file in [path / MODEL] if index is None else [path / name for name in sorted(set(index.values()))]:
        if not file.is_file():
            hint = "download or copy the folder again"
            raise HandgradError("hf", f"{file} exists: {INDEX} names it", "no such file", hint=hint)
        handle = _open(file)
        for theirs in _readable(file, handle.keys):
            name = theirs.removeprefix(form.prefix)
            if name in found:
                raise HandgradError("hf", f"{path} holds one tensor {shown(name)}", f"two, the second in {file.name}")
            if index is not None and index.pop(theirs, None) != file.name:
                rule = f"{path / INDEX} says that {shown(theirs)} is in {file.name}, where it is"
                raise HandgradError("hf", rule, "another file, or none")
            found[name] = file, handle, theirs
    for theirs, file_name in (index or {}).items():
        raise HandgradError("hf", f"{path / file_name} holds {shown(theirs)}, as {INDEX} says", "no such tensor")
    return found


def _index(path: Path) -> dict[str, str]:
    """Which file of a folder each tensor is in."""
    if not (path / INDEX).is_file():
        old = any((path / name).exists() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
        hint = "transformers' save_pretrained writes it from pytorch_model.bin" if old else ""
        raise HandgradError("hf", f"{path} holds {MODEL} or {INDEX}", "neither", hint=hint)
    found = read_object(path / INDEX, "hf").get("weight_map")
    if not isinstance(found, dict) or not found or not all(map(_is_name, found.values())):
        raise HandgradError("hf", f"{path / INDEX} says in which file beside it a tensor is", "no such weight_map")
    return found


def _is_name(value: object) -> bool:
    """Whether it can be the name of a file in a folder."""
    # printable: no NUL, no line break, no half of a surrogate pair
    return isinstance(value, str) and Path(value).name == value and value.isprintable()


def _open(file: Path) -> Any:
    """An open safetensors file."""
    with _readable(file, file.open, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
    if MOST_HEADER < size < file.stat().st_size:
        raise HandgradError("hf", f"the header of {file} has at most {MOST_HEADER:,} bytes", f"{size:,}")
    return _readable(file, safe_open, file, "np", backend="pread")


def _equal(table: Place, head: Place) -> bool:
    """Whether two tensors hold the same values, compared as float32."""
    a, b = (_readable(file, handle.get_slice, name) for file, handle, name in (table, head))
    shape = tuple(a.get_shape())
    if shape != tuple(b.get_shape()) or len(shape) != 2:
        return False

    def rows(place: Place, part: Any, at: int) -> np.ndarray:
        return _readable(place[0], lambda: part[at : min(at + ROWS, shape[0])]).astype(np.float32)

    return all(np.array_equal(rows(table, a, at), rows(head, b, at)) for at in range(0, shape[0], ROWS))


def _readable(path: Path, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return read(*args, **kwargs)
    except (OSError, SafetensorError) as error:
        raise HandgradError("hf", f"{path} is a whole safetensors file", one_line(error)) from None
