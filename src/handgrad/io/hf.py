"""Hugging Face's folders: config.json and model.safetensors, in one file or in several with an index.

A `Format` (io/format.py), which the caller gives, says what a family's fields and tensors are called there. Tokenizer
files are the business of `handgrad.tokenizers`.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from handgrad.core.disk import flush, write_text
from handgrad.core.errors import HandgradError, one_line
from handgrad.core.install import install_command
from handgrad.core.json_file import read_object, shown
from handgrad.io import format
from handgrad.io.format import Format, Stored
from handgrad.io.weights import Weights

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
TOKENIZER = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
POOLING = "1_Pooling/config.json"  # of sentence-transformers
FILES = (CONFIG, POOLING, GENERATION, ADAPTER, "model*.safetensors", INDEX, *TOKENIZER)  # what a download needs
MOST_HEADER = 8 << 20  # bytes of a safetensors header; 1,024 layers take 2 MB, and the format allows a slow 100 MB
LOGIN = "hf auth login, with a token that may write"
MOST_FILE = 5 * 10**9  # bytes of the tensors in a file; a larger model is written into several, with an index
ROWS = 4096  # of two tables that are compared: their float32 copies stay below 100 MB


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
    found = format.read_fields(form, read_object(path / CONFIG, "hf"), "hf", path / CONFIG)
    for flag, name in form.optional.items():
        found[flag] = found[flag] and holds(path, form, name)
    flag, *pair = form.tied
    if found.get(flag) is True:
        tensors = _tensors(path, form)
        table, head = (tensors.get(form.names(name)[0].removeprefix(form.prefix)) for name in pair)
        found[flag] = table is None or head is None or _equal(table, head)
    return found


def holds(path: Path, form: Format, name: str) -> bool:
    """Whether a folder holds a tensor of ours."""
    return form.names(name)[0].removeprefix(form.prefix) in _tensors(path, form)


def read(path: Path, form: Format, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The model in a folder. Raises HandgradError if our kernels do not compute it, or a tensor is missing.

    fields: all of the model's, as it was built from `read_fields`;  shapes: of its tensors, without padding

    The stored tensors say what the dtype is, whatever config.json calls it.
    """
    config = read_object(path / CONFIG, "hf")
    format.check_only(form, config, fields, "hf", path / CONFIG)
    if (path / ADAPTER).exists():
        hint = "merge it with peft's merge_and_unload; or train on from it: --init its model --lora-init the adapter"
        raise HandgradError("hf", f"'{path}' holds a whole model", f"{ADAPTER} of an adapter", hint=hint)
    found = {name: _stored(*place) for name, place in _tensors(path, form).items()}
    kind, known = shown(config.get("architectures")), form.model_types.values()
    hint = "" if any(name in kind for name in known) else f"{' or '.join(known)} is read here; this is {kind}"
    return format.read_weights(form, fields, shapes, found, "hf", path, CONFIG, hint)


def write(
    path: Path,
    form: Format,
    weights: Weights,
    dtype: str | None = None,
    ends: Sequence[int] = (),
    suppressed: Sequence[int] = (),
    begins: Sequence[int] = (),
) -> None:
    """Writes config.json, the tensors and, if it has something to say, generation_config.json into a folder.

    dtype: "f32", "bf16", or None for the weights' own;  ends: the tokens that end a text, unless the family has its own
    suppressed: ids that `generate` of transformers must not draw;  begins: the tokens that precede a text

    Up to MOST_FILE bytes of tensors become model.safetensors, more become several files with an index.
    """
    dtype, config = dtype or weights.dtype, form.config(weights.fields)
    end = {
        "bos_token_id": (*begins, *ends, None)[0],
        "eos_token_id": config.get("eos_token_id", list(ends) if len(ends) > 1 else ends[0] if ends else None),
    }
    config |= {**end, "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype]}
    write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")
    if suppressed:
        end["suppress_tokens"] = list(suppressed)
    if ends or suppressed:
        write_text(path / GENERATION, json.dumps(end, indent=2) + "\n")
    parts = [part for name, shape in weights.shapes.items() for part in form.parts(name, shape, weights.fields)]
    files = _divide(parts, dtype, MOST_FILE)
    names = [MODEL] if len(files) == 1 else [SHARD.format(i + 1, len(files)) for i in range(len(files))]
    tensors = form.apart(weights, dtype)  # tensor by tensor: no second copy of the model in memory
    for name, header in zip(names, files, strict=True):
        _write_tensors(path / name, header, tensors)
    if len(files) > 1:
        total = sum(math.prod(shape) for _, shape in parts) * {"f32": 4, "bf16": 2}[dtype]
        where = {tensor: name for name, header in zip(names, files, strict=True) for tensor in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(path / INDEX, json.dumps(index, indent=2) + "\n")
    flush(path)


def write_file(
    path: Path, parts: Sequence[tuple[str, tuple[int, ...]]], tensors: Iterator[tuple[str, np.ndarray]], dtype: str
) -> None:
    """Writes one safetensors file. parts: (name, shape) of all tensors;  tensors: (any name, values) in this order."""
    (header,) = _divide(parts, dtype, math.inf)
    _write_tensors(path, header, tensors)


def stored_tensors(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, of which only the header has been read."""
    handle = _open(file)
    return [_stored(file, handle, name) for name in _readable(file, handle.keys)]


def _divide(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str, most: float) -> list[dict[str, dict[str, Any]]]:
    """The headers of the files that (name, shape) of all tensors need, each of at most `most` bytes if it can be."""
    files: list[dict[str, dict[str, Any]]] = [{}]
    at = 0
    for name, shape in tensors:
        size = math.prod(shape) * {"f32": 4, "bf16": 2}[dtype]
        if files[-1] and at + size > most:
            files.append({})
            at = 0
        files[-1][name] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": (at, at + size)}
        at += size
    return files


def _write_tensors(path: Path, header: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes one safetensors file with the next tensors, which the header describes."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in itertools.islice(tensors, len(header)):
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


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
            name = form.renamed(theirs.removeprefix(form.prefix))
            if name in found:
                raise HandgradError("hf", f"{path} holds one tensor {shown(name)}", f"two, the second in {file.name}")
            if index is not None and index.pop(theirs, None) != file.name:
                rule = f"{path / INDEX} says that {shown(theirs)} is in {file.name}, where it is"
                raise HandgradError("hf", rule, "another file, or none")
            found[name] = file, handle, theirs
    for theirs, file_name in (index or {}).items():
        raise HandgradError("hf", f"{path / file_name} holds {shown(theirs)}, as {INDEX} says", "no such tensor")
    return found


def _stored(file: Path, handle: Any, theirs: str) -> Stored:
    """A tensor of a folder, of which only the header has been read."""
    about = _readable(file, handle.get_slice, theirs)
    read = functools.partial(_readable, file, handle.get_tensor, theirs)
    return Stored(theirs, tuple(about.get_shape()), about.get_dtype(), read)


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
    # printable: no NUL, no line break, no lone surrogate
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
