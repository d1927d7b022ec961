"""Hugging Face's GPT-2 folders: config.json and model.safetensors, in one file or in several with an index.

Tensors have our names behind "transformer.", but matrices of the blocks lie transposed (in, out), the vocabulary is not
padded, and a tied head is not stored. Tokenizer files are the business of `handgrad.tokenizers`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from handgrad.core.errors import HandgradError
from handgrad.io.weights import BLOCK, Weights, check_sizes

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FILES = (CONFIG, "model*.safetensors", INDEX, "tokenizer*.json", "vocab.json", "merges.txt")  # what a download needs
SIZES = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
}
DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
ONLY = {  # key: the values that our kernels compute, the library's default first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f32"}  # float16 has fewer values than float32, and others than bf16
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, stored by old versions
PREFIX = "transformer."


def download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, downloaded or found in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "pip install 'handgrad[hub]', or give a local folder"
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


def read(path: str | Path) -> Weights:
    """The model in a folder. Raises HandgradError unless it is a GPT-2 that we compute, and whole."""
    path = Path(path)
    config = _json(path / CONFIG)
    if config.get("model_type") != "gpt2":
        raise HandgradError("hf", f"{path / CONFIG} has the model_type gpt2", repr(config.get("model_type")))
    sizes: dict[str, Any] = {ours: config.get(theirs, DEFAULTS[theirs]) for ours, theirs in SIZES.items()}
    check_sizes(sizes, "hf", path / CONFIG)
    sizes["tie_embeddings"] = config.get("tie_word_embeddings", True) is True
    width = 4 * sizes["hidden_size"]
    for key, values in (ONLY | {"n_inner": (None, width)}).items():
        if config.get(key, values[0]) not in values:
            rule = f"{path / CONFIG} has {key} {' or '.join(str(value) for value in values)}"
            raise HandgradError("hf", rule, config[key], hint="no kernel here computes another")
    places, types = {}, set()
    for file in _files(path):
        handle = _readable(file, safe_open, file, "np", backend="pread")
        for theirs in _readable(file, handle.keys):
            name = theirs.removeprefix(PREFIX)
            if BUFFER.fullmatch(name) or (name == "lm_head.weight" and sizes["tie_embeddings"]):
                continue
            header = _readable(file, handle.get_slice, theirs)
            places[name] = file, handle, theirs, tuple(header.get_shape())
            types.add(header.get_dtype())
    if types - set(DTYPES):
        raise HandgradError("hf", f"tensors in {path} are {', '.join(DTYPES)}", ", ".join(sorted(types)))
    dtype = "bf16" if types == {"BF16"} else "f32"

    def tensor(name: str) -> np.ndarray:
        file, handle, theirs, _ = places[name]
        values = _readable(file, handle.get_tensor, theirs)
        return values.T if _is_transposed(name) else values

    weights = Weights(sizes, dtype, tensor)
    _check_tensors(path, weights, {name: shape for name, (*_, shape) in places.items()})
    return weights


def write(path: str | Path, weights: Weights, dtype: str | None = None, dropout: float = 0.0, eot: int | None = None):
    """Writes config.json and model.safetensors into a folder that exists.

    dtype: "f32", "bf16", or None for the weights' own;  eot: the token that ends a text
    """
    path, dtype = Path(path), dtype or weights.dtype
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: weights.sizes[ours] for ours, theirs in SIZES.items()},
        "n_inner": None,
        **{key: values[0] for key, values in ONLY.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "tie_word_embeddings": weights.sizes["tie_embeddings"],
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[dtype],
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in weights.shapes().items():
        size = int(np.prod(shape)) * {"f32": 4, "bf16": 2}[dtype]
        shape = shape[::-1] if _is_transposed(name) else shape
        header[_theirs(name)] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / MODEL).open("wb") as file:  # tensor by tensor: no second copy of the model in memory
        file.write(len(text).to_bytes(8, "little") + text)
        for name in weights.shapes():
            values = weights.tensor(name, dtype)
            file.write(np.ascontiguousarray(values.T if _is_transposed(name) else values).reshape(-1).view(np.uint8))


def _is_transposed(name: str) -> bool:
    """Whether a tensor of ours is the transpose of theirs: that of a linear layer inside a block."""
    return name.startswith("h.") and len(BLOCK.get(name.split(".", 2)[2], ())) == 2


def _theirs(name: str) -> str:
    return name if name == "lm_head.weight" else PREFIX + name


def _check_tensors(path: Path, weights: Weights, found: dict[str, tuple[int, ...]]) -> None:
    """Raises HandgradError unless the folder has the tensors of its config, and no others."""
    layers = weights.sizes["num_layers"]
    if layers * len(BLOCK) > len(found):  # before a list is made of a number that may be damaged
        raise HandgradError("hf", f"{path} holds the {layers} layers of its {CONFIG}", f"{len(found)} tensors")
    wanted = weights.shapes()
    for name in sorted(wanted.keys() ^ found.keys()):
        what = f"holds the tensor {_theirs(name)}" if name in wanted else "holds the tensors of a GPT-2 alone"
        raise HandgradError("hf", f"{path} {what}", "no such" if name in wanted else f"also {_theirs(name)}")
    for name, shape in wanted.items():
        shape = shape[::-1] if _is_transposed(name) else shape
        if found[name] != shape:
            raise HandgradError("hf", f"{_theirs(name)} in {path} has shape {shape}", found[name])


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
