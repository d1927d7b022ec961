"""GGUF, the files of llama.cpp: metadata, a tokenizer and tensors in one file (io/gguf_file.py reads them).

A file says "<architecture>.<key>" of its model. `Layout`, which a family's `Format` holds, says what these keys and its
tensors are called in Hugging Face's library; the rest is the Format's business.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.core.json_file import shown
from handgrad.io import format
from handgrad.io.format import Format, Stored
from handgrad.io.gguf_file import NUMBER_OF, PLAIN, TYPES, File, load_package
from handgrad.io.weights import NUMPY, Weights

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # what general.file_type calls a file of mostly this type
FREQUENCIES = "rope_freqs.weight"  # what the frequencies of rotary positions are divided by
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SMALL = 1 << 22  # numbers of a float32 tensor that is read to see whether bf16 holds it
# keys of an architecture that no config.json has: the values that change nothing
NEUTRAL: dict[str, tuple] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False, True),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "use_parallel_residual": (True,),
}


@dataclass(frozen=True)
class Layout:
    """What one family is called in GGUF.

    architectures: the model_type in Hugging Face's library: the architecture
    keys: behind "<architecture>.": their key of config.json, "a.b" for b inside a. Several may be one
    tensors: their tensor without .weight or .bias, {} for the number of a block: the name in GGUF
    implies: what config.json must say besides
    defaults: what llama.cpp takes for a key that a file leaves out, where transformers takes another value
    encode: from our fields: what `keys` names and a folder's config.json says otherwise
    fixed: from our fields: those that no key gives, with the only values that llama.cpp computes
    interleaved: architectures whose rotation turns neighbours, not halves, and the key with the heads of each tensor
        whose rows are therefore in another order
    """

    architectures: Mapping[str, str]
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    implies: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    fixed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    interleaved: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def name(self, theirs: str) -> str:
        """From the name of a tensor in Hugging Face's library, that in GGUF."""
        module, kind = theirs.rsplit(".", 1)
        number = re.search(r"\.(\d+)\.", module)
        pattern = module if number is None else module.replace(number[0], ".{}.", 1)
        return f"{self.tensors[pattern].format(number[1] if number else '')}.{kind}"

    def renamed(self, form: Format) -> Format:
        """The family's Format with the names of GGUF, where every matrix is (out, in), as ours are."""
        return replace(
            form,
            names=lambda name: tuple(self.name(theirs) for theirs in form.names(name)),
            prefix="",
            transposed="(?!)",
            shifted="(?!)",
            ignored="(?!)",
        )

    def heads(self, architecture: str, name: str) -> str | None:
        """The key with the heads of a tensor whose rows are in the order of an interleaved rotation."""
        matches = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", name)
        return self.interleaved.get(architecture, {}).get(matches[1]) if matches else None


# models ---------------------------------------------------------------------------------------------------------------


def read_fields(file: File, form: Format) -> dict[str, Any]:
    """The fields of our model that a file gives, unchecked. Raises HandgradError for metadata that we do not know."""
    fields = format.read_fields(form, _config(file, form), "gguf", file.path)
    return fields | dict(_layout(file, form).fixed(fields))


def read(file: File, form: Format, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """The model in a file. Raises HandgradError if our kernels do not compute it, or a tensor is missing.

    fields: all of the model's, as it was built from `read_fields`;  shapes: of its tensors, without padding

    It is bf16 if all matrices are, and bf16 holds the rest exactly; otherwise float32.
    """
    format.check_only(form, _config(file, form), fields, "gguf", file.path)
    layout, is_bf16 = _layout(file, form), _is_bf16(file)
    found = {}
    for name, place in file.places.items():
        if name != FREQUENCIES:
            read = functools.partial(_read_rows, file, layout, name, is_bf16)
            found[name] = Stored(name, place.shape, "BF16" if is_bf16 else "F32", read)
    return format.read_weights(layout.renamed(form), fields, shapes, found, "gguf", file.path, "metadata")


def _is_bf16(file: File) -> bool:
    """Whether a file loses nothing in bf16."""
    types = {place.type for place in file.places.values() if len(place.shape) > 1}
    if "BF16" not in types or types - {"BF16", "F32"}:
        return False
    rest = {name: place for name, place in file.places.items() if place.type != "BF16" and name != FREQUENCIES}
    if any(place.type != "F32" or math.prod(place.shape) > SMALL for place in rest.values()):
        return False
    return all(np.array_equal(x, x.astype(NUMPY["bf16"]).astype(np.float32)) for x in map(file.read, rest))


def _read_rows(file: File, layout: Layout, name: str, is_bf16: bool) -> np.ndarray:
    """A tensor with its rows in the order of a rotation of halves."""
    values = file.read(name).astype(NUMPY["bf16" if is_bf16 else "f32"], copy=False)
    key = layout.heads(file.architecture, name)
    if key is None:
        return values
    told, arch = file.metadata, file.architecture
    heads = told.get(f"{arch}.{key}", told.get(f"{arch}.attention.head_count"))
    if len(values) % (2 * heads):
        rule = f"{name} in {file.path} rotates {heads} heads of an even size"
        raise HandgradError("gguf", rule, f"{len(values)} rows")
    return _reorder(values, heads, interleave=False)


def _reorder(values: np.ndarray, heads: int, *, interleave: bool) -> np.ndarray:
    """Rows of every head in the order of a rotation of neighbours, from that of a rotation of halves; or back."""
    half = len(values) // heads // 2
    split = (heads, 2, half) if interleave else (heads, half, 2)
    return values.reshape(*split, -1).swapaxes(1, 2).reshape(values.shape)


def _layout(file: File, form: Format) -> Layout:
    if form.gguf is None:
        raise HandgradError("gguf", "no .gguf of this family can be read", f"{file.path}, {shown(file.architecture)}")
    return Layout(**form.gguf)


def _config(file: File, form: Format) -> dict[str, Any]:
    """What config.json would say of a file's model."""
    path, arch = file.path, file.architecture
    layout = _layout(file, form)
    kinds = {there: kind for kind, there in layout.architectures.items()}
    if arch not in kinds:
        raise HandgradError("gguf", f"{path} has the architecture {' or '.join(kinds)}", shown(arch))
    config: dict[str, Any] = {"model_type": kinds[arch], **layout.implies}
    given = {key.removeprefix(f"{arch}."): x for key, x in file.metadata.items() if key.startswith(f"{arch}.")}
    told = {**layout.defaults, **given}
    for key, value in told.items():
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if key in NEUTRAL and value in NEUTRAL[key] or key == "vocab_size":
            continue
        if key not in layout.keys:
            hint = "no kernel here computes another" if key in NEUTRAL else ""
            rule = f"{path} says of its model {', '.join([*layout.keys, *NEUTRAL])}"
            raise HandgradError("gguf", rule, f"{shown(key)} {shown(value)}", hint=hint)
        value = float(str(np.float32(value))) if type(value) is float else value  # 1e-05, not 9.999999747e-06
        at, last = _inside(config, layout.keys[key])
        if last in at and not format.same(at[last], value):
            raise HandgradError("gguf", f"{path} has one value for {key} and its like", f"{value} and {at[last]}")
        at[last] = value
    heads, width = told.get("attention.head_count"), told.get("embedding_length")
    for key, value in (("head_count_kv", heads), ("key_length", _quotient(width, heads))):  # llama.cpp's defaults
        if f"attention.{key}" in layout.keys and value is not None:
            config.setdefault(layout.keys[f"attention.{key}"], value)
    table, head = (layout.name(form.names(name)[0]) for name in form.tied[1:])
    if table in file.places:
        config["vocab_size"] = file.places[table].shape[0]
    config["tie_word_embeddings"] = head not in file.places
    if FREQUENCIES in file.places:
        at, _ = _inside(config, layout.keys.get("rope.freq_base", ""))
        at |= _scaling(file, at, config.get("head_dim"))
    return config


def _inside(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """(the object, the key in it) that "a.b" means."""
    *outer, last = key.split(".")
    for name in outer:
        config = config.setdefault(name, {})
    return config, last


def _quotient(width: object, heads: object) -> int | None:
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


def _factors(rope: Mapping[str, Any], head_size: int) -> np.ndarray:
    """What Llama 3.1's scaling divides the frequencies of a head by, (head_size / 2,) float32."""
    inverse = 1 / rope["rope_theta"] ** (np.arange(0, head_size, 2) / head_size)
    turns = rope["original_max_position_embeddings"] * inverse / (2 * np.pi)  # in the text it was trained on first
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    part = np.clip((turns - low) / (high - low), 0, 1)  # 0: all of the factor;  1: none
    return (1 / ((1 - part) / rope["factor"] + part)).astype(np.float32)


def _scaling(file: File, rope: Mapping[str, Any], head_size: object) -> dict[str, Any]:
    """Llama 3.1's scaling, with its usual bounds, that the factors in a file come from."""
    place = file.places[FREQUENCIES]
    theta = rope.get("rope_theta")
    if place.type == "F32" and place.shape == (_quotient(head_size, 2),) and type(theta) is float and theta > 0:
        found = file.read(FREQUENCIES)
        scaling = {"rope_type": "llama3", "factor": float(found.max()), **LLAMA3}
        with np.errstate(all="ignore"):
            if np.allclose(found, _factors({**rope, **scaling}, 2 * len(found)), rtol=1e-4, atol=0):
                return scaling
    rule = f"{FREQUENCIES} in {file.path} scales rotary positions as Llama 3.1 does"
    raise HandgradError("gguf", rule, f"other factors, {place.type} {place.shape}")


# writing --------------------------------------------------------------------------------------------------------------


def write(path: Path, form: Format, weights: Weights, dtype: str, tokenizer: Mapping[str, Any]) -> None:
    """Writes a model that llama.cpp runs.

    dtype: "f32", "f16", "bf16" or "q8_0", of matrices; vectors and positions are float32, as in llama.cpp's own files,
        and rows that are no multiple of 32 float16 instead of q8_0
    tokenizer: its keys, "tokenizer.ggml.tokens" and others

    Raises HandgradError for a model that GGUF cannot describe.
    """
    if form.gguf is None:
        raise HandgradError("gguf", "a model of this family cannot be written as a .gguf")
    package, layout, fields = load_package("a file for llama.cpp"), Layout(**form.gguf), weights.fields
    scaling = fields.get("rope_scaling")
    if scaling and list(scaling[1:]) != list(LLAMA3.values()):
        rule = f"a .gguf scales rotary positions by {', '.join(f'{k} {v}' for k, v in LLAMA3.items())}"
        raise HandgradError("gguf", rule, scaling)
    form = layout.renamed(form)
    for ours, value in layout.fixed(fields).items():
        if fields[ours] != value:
            raise HandgradError("gguf", f"llama.cpp runs a model whose {ours} is {value}", fields[ours])
    if form.model_type(fields) not in layout.architectures:
        rule = f"llama.cpp runs a model of the kind {' or '.join(layout.architectures)}"
        raise HandgradError("gguf", rule, f"{form.model_type(fields)}, which its files cannot describe")
    arch, config = layout.architectures[form.model_type(fields)], form.config(fields)
    writer, told = package.GGUFWriter(None, arch), _metadata(form, layout, fields, arch)
    told |= {"general.file_type": FILE_TYPES[dtype.upper()]}
    for key, value in (told | dict(tokenizer)).items():
        _add(writer, key, value)
    rope = config.get("rope_parameters", {})
    factors = _factors(rope, config["head_dim"]) if rope.get("rope_type") == "llama3" else None
    parts = [part for name, shape in weights.shapes.items() for part in form.parts(name, shape, fields)]
    types = {}
    for name, shape in parts:
        types[name] = _type_of(name, shape, dtype.upper())
        _declare(package, writer, name, shape, types[name])
    if factors is not None:
        _declare(package, writer, FREQUENCIES, factors.shape, "F32")
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, values in form.apart(weights, "f32"):  # tensor by tensor: no second copy of the model in memory
            heads = layout.heads(arch, name)
            values = values if heads is None else _reorder(values, told[f"{arch}.{heads}"], interleave=True)
            writer.write_tensor_data(_pack(package, name, values, types[name]))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()


def _metadata(form: Format, layout: Layout, fields: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The keys of a file that describe its model."""
    config = form.config(fields) | dict(layout.encode(fields))
    told: dict[str, Any] = {"general.type": "model", "general.quantization_version": 2}
    told[f"{arch}.vocab_size"] = fields["vocab_size"]
    for key, theirs in layout.keys.items():
        at, last = _inside(config, theirs)
        # of a key that config.json may leave empty, the last of the values that we compute is the explicit one
        told[f"{arch}.{key}"] = form.only(fields)[theirs][-1] if at[last] is None else at[last]
    return told


def _declare(package: Any, writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announces a tensor, which is to be written in this order."""
    _, block, size = TYPES[NUMBER_OF[kind]]
    number = package.GGMLQuantizationType(NUMBER_OF[kind])
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=number)


def _type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type that a tensor is stored as."""
    if len(shape) == 1 or name.startswith("position_embd."):
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % TYPES[NUMBER_OF["Q8_0"]][1] else wanted


def _pack(package: Any, name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """A float32 tensor as the bytes of a type."""
    if kind not in PLAIN:
        return package.quants.quantize(np.ascontiguousarray(values), package.GGMLQuantizationType(NUMBER_OF[kind]))
    with np.errstate(over="ignore"):
        packed = np.ascontiguousarray(values.astype(PLAIN[kind]))
    if kind == "F16" and np.isinf(packed).any() and not np.isinf(values).any():
        rule = f"{name} has numbers that float16 can hold, up to 65504"
        raise HandgradError("gguf", rule, f"{np.abs(values).max():g}", hint="--dtype bf16 holds them")
    return packed.view(np.uint8)


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a key with the type that llama.cpp expects."""
    kinds: dict[type, Callable[..., None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
