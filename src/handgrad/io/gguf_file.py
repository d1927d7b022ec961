"""What a GGUF file holds, read within bounds. Little-endian, versions 2 and 3.

    "GGUF", version u32, tensors u64, keys u64
    keys:    name, type u32, value. A text is its length (u64) and UTF-8; a list its type (u32), length (u64) and items
    tensors: name, dimensions u32, each u64 (the fastest first), type u32, place u64 (from the start of the data)
    data:    begins at a multiple of general.alignment (32), as every tensor does

The package gguf unpacks blocks of quantised numbers. Its reader believes every size that a file tells, so files are
read here: no memory is taken, and no loop begins, for more than what is left of the file.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.install import install_command
from handgrad.core.json_file import shown
from handgrad.io.weights import NUMPY

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# Bounds of what precedes the tensors. Gemma's vocabulary, the largest in use, has 262,144 tokens and 514,906 merges.
MOST_HEADER, MOST_TEXTS, MOST_KEYS, MOST_TENSORS = 64 << 20, 1 << 20, 1 << 12, 1 << 16
MOST_NAME, MOST_DIMENSIONS = 64, 4
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
# type: its name, the numbers of a block, the bytes of a block
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
NUMBER_OF = {name: number for number, (name, _, _) in TYPES.items()}
PLAIN = {"F32": NUMPY["f32"], "F16": np.dtype(np.float16), "BF16": NUMPY["bf16"]}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its shape, the slowest dimension first, its type and its first byte."""

    shape: tuple[int, ...]
    type: str
    start: int


@dataclass(frozen=True)
class File:
    """A file of which all but the tensors has been read."""

    path: Path
    metadata: Mapping[str, Any]
    places: Mapping[str, Place]

    @property
    def architecture(self) -> str:
        """What the file calls its kind of model."""
        return str(self.metadata["general.architecture"])

    def read(self, name: str) -> np.ndarray:
        """A tensor: float32, float16 or bf16 as it is stored, unpacked to float32 if it is quantised."""
        place = self.places[name]
        _, block, size = TYPES[NUMBER_OF[place.type]]
        count = math.prod(place.shape) // block * size
        try:
            raw = np.fromfile(self.path, np.uint8, count, offset=place.start)
        except OSError as error:
            raise HandgradError("gguf", f"{self.path} must be readable", error.strerror) from None
        if raw.size < count:
            raise HandgradError("gguf", f"{self.path} holds {name}", "a file that has become shorter")
        if place.type in PLAIN:
            return raw.view(PLAIN[place.type]).reshape(place.shape)
        package = load_package(f"{name} in {self.path}, which is {place.type},")
        kind = package.GGMLQuantizationType(NUMBER_OF[place.type])
        with np.errstate(all="ignore"):  # factors of a damaged file may be infinite
            return package.quants.dequantize(raw.reshape(*place.shape[:-1], -1), kind)


def is_gguf(path: Path) -> bool:
    """Whether a file is meant to be GGUF: by its name, or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_file(path: Path) -> File:
    """Reads and checks all but the tensors. Raises HandgradError unless the file is GGUF and complete."""
    size = require_file(path, "a GGUF file", "gguf")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise HandgradError(
                    "gguf", f"{path} begins with GGUF", "other bytes", hint="it is no file of llama.cpp"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(path, data, min(size, MOST_HEADER)), size)
    except OSError as error:
        raise HandgradError("gguf", f"{path} must be readable", error.strerror) from None


# headers --------------------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads values one after the other, none beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap, end: int):
        self.path, self.data, self.end, self.at, self.texts = path, data, end, len(MAGIC), 0

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            got = f"a value of {count:,} bytes at {self.at:,}"
            rule = f"the header of {self.path} ends within {self.end:,} bytes"
            raise HandgradError("gguf", rule, got, hint="it is cut off or damaged")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        self.texts += 1
        if self.texts > MOST_TEXTS:
            raise HandgradError("gguf", f"the header of {self.path} has at most {MOST_TEXTS:,} texts", "more")
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise HandgradError("gguf", f"texts in {self.path} are UTF-8", shown(repr(raw[:40]))) from None

    def value(self, kind: int, name: str) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise HandgradError("gguf", f"{shown(name)} in {self.path} has a type from 0 to 12", kind)
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            self.must_hold(count, 8)
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise HandgradError("gguf", f"{shown(name)} in {self.path} is a list of numbers or texts", f"type {kind}")
        dtype = np.dtype("<" + {"q": "i8", "Q": "u8"}.get(NUMBERS[kind], NUMBERS[kind]))
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def must_hold(self, count: int, least: int) -> None:
        """Raises HandgradError unless so many things of at least so many bytes can follow."""
        if count * least > self.end - self.at:
            self.take(count * least)


def _parse(path: Path, cursor: _Cursor, size: int) -> File:
    """The header behind the magic number of a file of `size` bytes."""
    version = cursor.number("I")
    if version not in VERSIONS:
        rule = f"{path} is of GGUF version {' or '.join(map(str, VERSIONS))}, little-endian"
        raise HandgradError("gguf", rule, f"version {version}")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if num_keys > MOST_KEYS or num_tensors > MOST_TENSORS:
        rule = f"{path} has at most {MOST_KEYS:,} keys and {MOST_TENSORS:,} tensors"
        raise HandgradError("gguf", rule, f"{num_keys:,} and {num_tensors:,}")
    cursor.must_hold(num_tensors, 8 + 4 + 8 + 4 + 8)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        name = cursor.text()
        if name in metadata:
            raise HandgradError("gguf", f"{path} gives every key once", f"{shown(name)} twice")
        metadata[name] = cursor.value(cursor.number("I"), name)
    if not isinstance(metadata.get("general.architecture"), str):
        raise HandgradError("gguf", f"{path} names its general.architecture", "none")
    if metadata.get("split.count", 1) not in (0, 1):
        hint = "llama-gguf-split --merge makes one file of them"
        raise HandgradError("gguf", f"{path} holds a whole model", f"one of {metadata['split.count']} files", hint=hint)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise HandgradError("gguf", f"{path} gives general.alignment from 1 to {1 << 20:,}", shown(alignment))
    infos = [_tensor_info(path, cursor, alignment) for _ in range(num_tensors)]
    start, places = -(-cursor.at // alignment) * alignment, {}
    for name, place, count in infos:
        if name in places:
            raise HandgradError("gguf", f"{path} holds every tensor once", f"{shown(name)} twice")
        end = start + place.start + count
        if end > size:
            rule = f"{path} has the {end:,} bytes that {shown(name)} ends at"
            raise HandgradError("gguf", rule, f"{size:,}", hint="it is cut off or damaged")
        places[name] = replace(place, start=start + place.start)
    return File(path, metadata, places)


def _tensor_info(path: Path, cursor: _Cursor, alignment: int) -> tuple[str, Place, int]:
    """(name, place behind the header, bytes) of the next tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if len(name) > MOST_NAME:
        raise HandgradError("gguf", f"names of tensors in {path} have at most {MOST_NAME} characters", shown(name))
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        rule = f"{shown(name)} in {path} has from 1 to {MOST_DIMENSIONS} dimensions"
        raise HandgradError("gguf", rule, dimensions)
    shape = [cursor.number("Q") for _ in range(dimensions)]
    kind, at = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise HandgradError("gguf", f"{shown(name)} in {path} is stored as one of {known}", f"type {kind}")
    type_name, block, size = TYPES[kind]
    if min(shape) < 1 or shape[0] % block:
        raise HandgradError("gguf", f"rows of {shown(name)} in {path} are blocks of {block} numbers", shown(shape))
    if at % alignment:
        raise HandgradError("gguf", f"{shown(name)} in {path} begins at a multiple of {alignment}", at)
    return name, Place(tuple(reversed(shape)), type_name, at), math.prod(shape) // block * size


def load_package(what: str) -> Any:
    """The package gguf, which `what` needs."""
    try:
        import gguf
    except ImportError:
        rule = f"{what} needs the package gguf"
        raise HandgradError("gguf", rule, "none", hint=install_command("gguf")) from None
    return gguf
