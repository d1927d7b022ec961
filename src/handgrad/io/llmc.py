"""llm.c's files: models, tokenizers, and the optimizer's state of a training run. Little-endian.

Each begins with 256 words of 4 bytes: a magic number, a version, then:

    model      20240326  3: float32, 5: bfloat16. Words 2-7: longest sequence, vocabulary, layers, heads, width, rows of
                         wte with padding. Then 16 tensors, wte to ln_f, every layer of a tensor before the next tensor
    tokenizer  20240328  2. Words 2-3: tokens, the one that ends a text. Then each: its length in a byte, its bytes
    state      20240527  1. Words 2-5: processes, rank, master weights?, shuffled?; 10: step; 20-23: two states of the
                         rounding's random numbers; 30-33: shard, sample. Then m, v (, master): float32. If shuffled,
                         the loader's two permutations and its Mersenne twister. Every process has a file

The reader compares every file's size with its header before it reads anything else.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.io.weights import NUMPY, Weights

HEADER = 256 * 4
MODEL, TOKENIZER, STATE = 20240326, 20240328, 20240527
NAMES = {
    MODEL: "a model",
    TOKENIZER: "a tokenizer",
    STATE: "a training state",
    20240327: "a debug state",
    20240520: "token shards",
    20240801: "token shards",
    20240522: "an evaluation file",
    20240803: "a Llama model",
}
VERSIONS = {MODEL: (3, 5), TOKENIZER: (2,), STATE: (1,)}
DTYPES = {3: "f32", 5: "bf16"}
WORDS = {"max_seq_len": 2, "vocab_size": 3, "num_layers": 4, "num_heads": 5, "hidden_size": 6}
ALIGN = 128  # what the rows of a vocabulary are rounded up to
# of a block, in the order of the file: name, shape in units of the width
BLOCK = {
    "ln_1.weight": (1,),
    "ln_1.bias": (1,),
    "attn.c_attn.weight": (3, 1),
    "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1),
    "attn.c_proj.bias": (1,),
    "ln_2.weight": (1,),
    "ln_2.bias": (1,),
    "mlp.c_fc.weight": (4, 1),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (1, 4),
    "mlp.c_proj.bias": (1,),
}
TWISTER = 2520  # bytes: seed (8, never set by llm.c), left, next, 624 words of state, 2 of matrix


# models ---------------------------------------------------------------------------------------------------------------


def read_model(path: str | Path) -> Weights:
    """The model in a .bin file. Raises HandgradError unless the file is one, and complete."""
    path = Path(path)
    header = _header(path, MODEL)
    sizes, rows = _sizes(path, header)
    dtype = NUMPY[DTYPES[header[1]]]
    layout = Layout(sizes, rows)
    _check_size(path, HEADER + layout.count * dtype.itemsize)
    shapes = {name: layout.find(name)[2] for name in layout.names()}
    shapes["wte.weight"] = (sizes["vocab_size"], layout.width)
    return Weights(sizes, DTYPES[header[1]], shapes, lambda name: layout.read(path, HEADER, dtype, name))


def write_model(path: str | Path, weights: Weights, dtype: str | None = None) -> None:
    """Writes a model as a .bin file that llm.c loads. dtype: "f32", "bf16", or None for the weights' own."""
    sizes, dtype = weights.fields, dtype or weights.dtype
    if not sizes.get("tie_embeddings", True):
        raise HandgradError("llmc", "a model for llm.c uses its token embedding as the head", "a separate lm_head")
    for name in sorted(set(names(sizes.get("num_layers", 0))) ^ weights.shapes.keys()):
        got = f"{'another' if name in weights.shapes else 'none'} called {name}"
        raise HandgradError("llmc", "a model for llm.c has the tensors of a GPT-2", got)
    layout = Layout(sizes, padded(sizes["vocab_size"]))
    words = {place: sizes[name] for name, place in WORDS.items()} | {7: layout.rows}
    with Path(path).open("wb") as file:
        file.write(_words(MODEL, {value: key for key, value in DTYPES.items()}[dtype], words))
        for name in layout.names():
            rows = layout.rows if name == "wte.weight" else None
            file.write(np.ascontiguousarray(weights.tensor(name, dtype, rows)).reshape(-1).view(np.uint8).data)


def padded(vocab_size: int) -> int:
    """Rows of a table of the vocabulary with the padding that `write_model` gives it."""
    return -(-vocab_size // ALIGN) * ALIGN


def names(layers: int) -> Iterator[str]:
    """Every tensor of a GPT-2 by our name, in the file's order."""
    yield from ("wte.weight", "wpe.weight")
    for name in BLOCK:
        yield from (f"h.{i}.{name}" for i in range(layers))
    yield from ("ln_f.weight", "ln_f.bias")


class Layout:
    """Where each tensor lies in the vector of all tensors.

    rows: of wte, padding included;  count: elements in all;  places: tensor -> (first element, elements in a layer)
    """

    def __init__(self, sizes: Mapping[str, Any], rows: int):
        c, self.layers, self.rows, self.seq_len = sizes["hidden_size"], sizes["num_layers"], rows, sizes["max_seq_len"]
        self.width, self.count, self.places = c, 0, {}
        outer = {"wte.weight": rows * c, "wpe.weight": self.seq_len * c}
        inner = {name: math.prod(units) * c ** len(units) for name, units in BLOCK.items()}
        for name, size in (outer | inner | {"ln_f.weight": c, "ln_f.bias": c}).items():
            self.places[name] = self.count, size
            self.count += size * (self.layers if name in BLOCK else 1)

    def names(self) -> Iterator[str]:
        """Every tensor by our name, in the file's order."""
        return names(self.layers)

    def find(self, name: str) -> tuple[str, int, tuple[int, ...]]:
        """(tensor, layer, shape) of our name."""
        if name.startswith("h."):
            _, layer, name = name.split(".", 2)
            return name, int(layer), tuple(self.width * n for n in BLOCK[name])
        rows = {"wte.weight": (self.rows,), "wpe.weight": (self.seq_len,)}.get(name, ())
        return name, 0, (*rows, self.width)

    def read(self, path: Path, start: int, dtype: np.dtype, name: str) -> np.ndarray:
        """One tensor of a vector that starts at byte `start`."""
        tensor, layer, shape = self.find(name)
        first, size = self.places[tensor]
        return _read(path, dtype, start + (first + layer * size) * dtype.itemsize, size).reshape(shape)


def _sizes(path: Path, header: np.ndarray) -> tuple[dict[str, Any], int]:
    """(fields of the model, rows of wte) that a model's header gives."""
    sizes = {name: int(header[place]) for name, place in WORDS.items()}
    for name, size in sizes.items():
        if size < 1:
            raise HandgradError("llmc", f"{path} gives {name} as a number from 1 on", size)
    if sizes["hidden_size"] % sizes["num_heads"]:
        got = f"{sizes['hidden_size']} and {sizes['num_heads']} heads"
        raise HandgradError("llmc", f"{path} gives a hidden_size that is a multiple of num_heads", got)
    if header[7] < sizes["vocab_size"]:
        raise HandgradError("llmc", f"{path} pads its vocabulary of {sizes['vocab_size']}", f"{header[7]} rows")
    return sizes | {"dropout": 0.0, "tie_embeddings": True}, int(header[7])


# training states ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """A process's place in its data, and the state of its random numbers.

    rng, rng_before_update: of stochastic rounding;  shard, sample: the next to read;  the rest is None unless shuffled:
    the permutations (int32) of shards and of samples in the shard, and the Mersenne twister's words (uint32): left,
    next, 624 of state, 2 of matrix
    """

    rng: int
    rng_before_update: int
    shard: int
    sample: int
    shard_order: np.ndarray | None = None
    sample_order: np.ndarray | None = None
    twister: np.ndarray | None = None


@dataclass(frozen=True)
class TrainState:
    """The state that all processes of an llm.c run save beside its weights.

    step: updates done;  flats: "m", "v" and, if the run has them, "master";  read: (flat, our name) -> float32 tensor,
    wte with padding;  loaders: of each process
    """

    step: int
    flats: tuple[str, ...]
    read: Callable[[str, str], np.ndarray]
    loaders: tuple[Loader, ...]


def state_files(model: str | Path) -> list[Path]:
    """The training states that llm.c wrote with model_<step>.bin, by rank; empty if there are none."""
    model = Path(model)
    step = model.stem.removeprefix("model_")
    return sorted(model.parent.glob(f"state_{step}_*.bin")) if model.name.startswith("model_") else []


def read_state(model: str | Path, files: Sequence[str | Path]) -> TrainState:
    """The training state of the model in `model`, from the files of all processes; HandgradError if one is missing."""
    sizes, rows = _sizes(Path(model), _header(Path(model), MODEL))
    layout = Layout(sizes, rows)
    ranks = [_rank(Path(file), layout) for file in files]
    first, _, parts = ranks[0]
    told = [tuple(int(word) for word in header[[2, 3, 4, 10]]) for header, _, _ in ranks]
    wanted = [(int(first[2]), rank, int(first[4]), int(first[10])) for rank in range(len(ranks))]
    if told != wanted or len(ranks) != first[2] or len({part for *_, part in ranks}) > 1:
        rule = f"the {first[2]} training states beside {model} are of one step, a file for every process"
        raise HandgradError("llmc", rule, f"{len(files)} files: (processes, rank, master, step) {told}")
    flats = ("m", "v", "master")[: 3 if first[4] else 2]

    def read(flat: str, name: str) -> np.ndarray:
        start = HEADER + flats.index(flat) * 4 * (layout.count // parts)
        if parts == 1:  # every process has all of it
            return layout.read(Path(files[0]), start, NUMPY["f32"], name)
        # each process holds a slice of every layer of every tensor, and its file packs the slices together
        tensor, layer, shape = layout.find(name)
        place, size = layout.places[tensor]
        at = start + (place // parts + layer * (size // parts)) * 4
        return np.concatenate([_read(Path(file), NUMPY["f32"], at, size // parts) for file in files]).reshape(shape)

    return TrainState(int(first[10]), flats, read, tuple(loader for _, loader, _ in ranks))


def _rank(path: Path, layout: Layout) -> tuple[np.ndarray, Loader, int]:
    """(header, loader, parts) of one process's file; parts: how many processes share the vectors."""
    header = _header(path, STATE)
    processes, master, shuffled = int(header[2]), bool(header[4]), bool(header[5])
    if not 1 <= processes <= 1 << 20 or header[10] < 0:
        raise HandgradError("llmc", f"{path} gives processes and step", f"{processes} and {header[10]}")
    size = path.stat().st_size
    rng, rng_before, shard, sample = (int(header[at : at + 2].view("<u8")[0]) for at in (20, 22, 30, 32))
    loader = Loader(rng, rng_before, shard, sample)
    for parts in dict.fromkeys((processes, 1)):  # ZeRO-1 divides the vectors; only the file's size tells
        if any(n % parts for _, n in layout.places.values()):
            continue
        at = HEADER + 4 * (3 if master else 2) * (layout.count // parts)
        if not shuffled and at == size:
            return header, loader, parts
        orders: list[tuple[int, int]] = []
        while shuffled and len(orders) < 2 and at + 8 <= size:
            count = int(_read(path, np.dtype("<u8"), at, 1)[0])
            if at + 8 + 4 * count > size:
                break
            orders.append((at + 8, count))
            at += 8 + 4 * count
        if len(orders) == 2 and at + TWISTER == size:
            shards, samples = (_read(path, np.dtype("<i4"), *order) for order in orders)
            twister = _read(path, np.dtype("<u4"), at + 8, 628)
            return header, replace(loader, shard_order=shards, sample_order=samples, twister=twister), parts
    rule = f"{path} holds the state of a model of {layout.count} numbers, on {processes} processes"
    raise HandgradError("llmc", rule, f"{size} bytes", hint="it is cut off, or another model's")


# tokenizers -----------------------------------------------------------------------------------------------------------


def read_tokenizer(path: str | Path) -> tuple[list[bytes], int]:
    """(the bytes of every token, the token that ends a text). The file decodes; it has no merges to encode with."""
    path = Path(path)
    header = _header(path, TOKENIZER)
    count, eot = int(header[2]), int(header[3])
    size = path.stat().st_size
    if not 1 <= count <= (size - HEADER) // 2 or not 0 <= eot < count:
        raise HandgradError("llmc", f"{path} gives tokens, and one of them as an end", f"{count} and {eot}")
    raw, at = _bytes(path, size), HEADER
    tokens: list[bytes] = []
    while len(tokens) < count and at < size:
        length = raw[at]
        tokens.append(raw[at + 1 : at + 1 + length])
        at += 1 + length
    if len(tokens) < count or at != size:
        got = f"{len(tokens)} in {size} bytes"
        raise HandgradError("llmc", f"{path} holds {count} tokens and ends there", got, hint="it is cut off or damaged")
    return tokens, eot


def write_tokenizer(path: str | Path, tokens: Sequence[bytes], eot: int | None) -> None:
    """Writes a tokenizer. llm.c starts its samples with `eot`; without one, the file names token 0."""
    for id, token in enumerate(tokens):
        if not 1 <= len(token) <= 255:
            raise HandgradError("llmc", "a token for llm.c is 1 to 255 bytes long", f"token {id} of {len(token)}")
    with Path(path).open("wb") as file:
        file.write(_words(TOKENIZER, 2, {2: len(tokens), 3: eot or 0}))
        file.write(b"".join(bytes([len(token)]) + token for token in tokens))


# headers and bytes ----------------------------------------------------------------------------------------------------


def _header(path: Path, magic: int) -> np.ndarray:
    """The 256 words (int32) of a file of this kind."""
    if not path.is_file():
        raise HandgradError("llmc", f"{path} is {NAMES[magic]} of llm.c", "no such file")
    raw = _bytes(path, HEADER)
    words = np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")
    if len(words) == 0 or words[0] != magic:
        other = NAMES.get(int(words[0])) if len(words) else None
        hint = "it was not made by llm.c, or a download stored an error page" if other is None else ""
        got = f"{other} of llm.c" if other else f"the magic number {words[0]}" if len(words) else f"{len(raw)} bytes"
        raise HandgradError("llmc", f"{path} is {NAMES[magic]} of llm.c, with the magic number {magic}", got, hint=hint)
    if len(raw) < HEADER:
        raise HandgradError("llmc", f"{path} begins with {HEADER} bytes of header", f"{len(raw)}", hint="it is cut off")
    if words[1] not in VERSIONS[magic]:
        known = " or ".join(str(version) for version in VERSIONS[magic])
        hint = "an old version: llm.c's train_gpt2.py writes it anew" if words[1] < max(VERSIONS[magic]) else ""
        raise HandgradError("llmc", f"{path} is of version {known}", words[1], hint=hint)
    return words


def _words(magic: int, version: int, values: dict[int, int]) -> bytes:
    """A header."""
    words = np.zeros(256, "<u4")
    words[[0, 1, *values]] = [magic, version, *values.values()]
    return words.tobytes()


def _check_size(path: Path, wanted: int) -> None:
    size = path.stat().st_size
    if size != wanted:
        hint = "it is cut off" if size < wanted else "it is damaged, or of another shape than its header says"
        raise HandgradError("llmc", f"{path} is {wanted} bytes long, by its header", size, hint=hint)


def _read(path: Path, dtype: np.dtype, at: int, count: int) -> np.ndarray:
    try:
        values = np.fromfile(path, dtype, count, offset=at)
    except OSError as error:
        raise HandgradError("llmc", f"{path} is readable", error.strerror) from None
    if len(values) < count:
        raise HandgradError("llmc", f"{path} stays as it was while it is read", "a shorter file")
    return values


def _bytes(path: Path, count: int) -> bytes:
    return _read(path, np.dtype(np.uint8), 0, min(count, path.stat().st_size)).tobytes()
