"""handgrad convert SRC DST: a model between llm.c's .bin, llama.cpp's .gguf, Hugging Face folders and run folders."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from handgrad.cli.flags import parse
from handgrad.core.disk import flush, make_folder
from handgrad.core.errors import HandgradError
from handgrad.core.replace import dead_writers, replace, restore, sibling, staged
from handgrad.infer.convert import num_adapter_params, to_adapter, to_gguf, to_hf, to_llmc, to_run
from handgrad.infer.load import Source, open_source
from handgrad.io import hf
from handgrad.tokenizers import Tokenizer

OF_A_MODEL = (
    "adapter_*",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "step_*",
    "tokenizer*",
    *hf.TOKENIZER,
)

WRITTEN = {
    "hf": "a Hugging Face folder",
    "adapter": "an adapter for peft",
    "handgrad": "a run folder",
    "llmc": "a model for llm.c",
    "gguf": "a model for llama.cpp",
}
FOREIGN = set(".pt .pth .ckpt .safetensors .ggml .onnx .npz .npy .h5 .pkl .pickle .msgpack .zip .tar .gz".split())


@dataclass(frozen=True)
class Convert:
    """Source, destination and format."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """run folder or checkpoint, a .bin of llm.c or its training folder, a .gguf, a Hugging Face folder, or hf:NAME"""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """a new folder, FILE.bin for llm.c, or FILE.gguf for llama.cpp"""
    to: Literal["auto", "hf", "llmc", "gguf", "handgrad"] = "auto"
    """format; auto: llmc for FILE.bin, gguf for FILE.gguf, hf for a run folder, otherwise handgrad"""
    dtype: Literal["saved", "f32", "bf16", "f16", "q8_0"] = "saved"
    """dtype of the written weights; saved: the source's; f16 and q8_0: of a .gguf alone"""
    adapter: bool = False
    """of a run with --lora-rank: write the adapter alone, as peft keeps it, not a model with it merged in"""
    ema: bool = False
    """convert the average of the weights that train --ema keeps"""
    force: bool = False
    """replace a file, or a folder that holds only a model"""
    push: str = ""
    """hf:NAME: upload what was written to the Hugging Face hub; needs the extra `hub`, and `hf auth login` once"""
    private: bool = False
    """make the uploaded model private, if it is new"""


def main(argv: list[str]) -> int:
    """Converts. The destination changes only when everything has been written."""
    a = parse(Convert, argv, "convert")
    check_push(a)
    dst, source = Path(a.dst), open_source(a.src, a.ema)
    to = kind_of(dst, a.to, source)
    if dst.suffix.lower() in FOREIGN:
        hint = f"a folder such as '{dst.with_suffix('')}'; --to hf writes model.safetensors into it"
        rule = "DST is a folder, FILE.bin for llm.c, or FILE.gguf for llama.cpp"
        raise HandgradError("convert", rule, f"'{a.dst}'", hint=hint)
    if not dst.name:
        raise HandgradError("convert", "DST names a file or a folder", f"'{a.dst}'")
    if to != "gguf" and a.dtype in ("f16", "q8_0"):
        raise HandgradError("convert", f"--dtype {a.dtype} is for FILE.gguf", f"'{a.dst}'")
    dtype = source.weights.dtype if a.dtype == "saved" else a.dtype
    check_adapter(a, source, to)
    try:
        tokenizer = source.tokenizer()
    except HandgradError as error:
        if to == "gguf":  # which holds one
            raise
        tokenizer = None
        print(f"no tokenizer: {error}")
        print("it converts without one; handgrad generate and eval need a tokenizer beside the new model")
    table, step = dst.with_name(f"{dst.stem}_tokenizer.bin"), 0
    try:
        repair(dst, table)
        for path in (dst, table) if to == "llmc" else (dst,):
            check_free(path, a.force)
        make_folder(dst.parent)
        if to == "llmc":
            write_files(source, dst, table, dtype, tokenizer)
        elif to == "gguf":
            with staged(dst) as new:
                to_gguf(source, new, dtype, tokenizer)
                replace(new, dst)
        else:
            step = write_folder(source, dst, "adapter" if a.adapter else to, dtype, tokenizer)
    except OSError as error:
        raise HandgradError("convert", f"cannot write '{dst}': {error.strerror or error}") from None
    count = num_adapter_params(source) if a.adapter else sum(map(math.prod, source.weights.shapes.values()))
    kind = "adapter" if a.adapter else to
    print(f"{dst}, {WRITTEN[kind]}: {count:,} parameters, {dtype}, from {source.path}")
    if step:
        print(f"resume: handgrad train --resume {dst} --steps N --train DATA")
    elif to not in ("hf", "gguf"):
        print(f"train from it: handgrad train --init {dst} --train DATA")
    if a.push:
        written = [path for path in (dst, table) if to == "llmc" and path.exists()] or [dst]
        print(f"uploaded: {hf.push(a.push.removeprefix('hf:'), written, a.private)}")
    return 0


def kind_of(dst: Path, to: str, source: Source) -> str:
    """The format to write. Raises HandgradError unless the destination's name goes with it."""
    of_file = {".bin": "llmc", ".gguf": "gguf"}.get(dst.suffix.lower())
    if to == "auto":
        to = of_file or ("hf" if source.kind == "handgrad" else "handgrad")
    if to != (of_file or to) or (to in ("llmc", "gguf") and not of_file):
        rule = "models for llm.c are files FILE.bin, for llama.cpp FILE.gguf, all others folders"
        raise HandgradError("convert", rule, f"'{dst}' for {to}")
    return to


def check_adapter(a: Convert, source: Source, to: str) -> None:
    """Raises HandgradError for --adapter of a model without one, or into another format than peft's."""
    if a.adapter and source.lora is None:
        raise HandgradError("convert", "--adapter is of a run with --lora-rank", f"'{a.src}'")
    if a.adapter and to != "hf":
        raise HandgradError("convert", "--adapter writes a folder, as peft does", f"--to {to}")


def check_push(a: Convert) -> None:
    """Raises HandgradError if the upload that was asked for cannot begin: before the work, not after it."""
    if a.push and not a.push.startswith("hf:"):
        raise HandgradError("convert", "--push takes hf:NAME", f"'{a.push}'", hint=f"--push hf:{a.push}")
    if a.private and not a.push:
        raise HandgradError("convert", "--private goes with --push hf:NAME", "no --push")
    if a.push:
        hf.check_push(a.push.removeprefix("hf:"))


def check_free(path: Path, force: bool) -> None:
    """Raises HandgradError if the path exists and must not be replaced."""
    if not path.exists():
        return
    if not force:
        raise HandgradError("convert", f"'{path}' exists already", hint="choose another name, or --force")
    if path.is_dir():
        others = sorted(p.name for p in path.iterdir() if not any(p.match(pattern) for pattern in OF_A_MODEL))
        if others:
            raise HandgradError("convert", f"--force replaces a folder that holds only a model: '{path}'", others[0])


def write_folder(source: Source, dst: Path, to: str, dtype: str, tokenizer: Tokenizer | None) -> int:
    """Writes a Hugging Face folder, an adapter, or a run folder; returns the step of the last."""
    step = 0
    with staged(dst) as new:
        new.mkdir()
        if to == "adapter":
            to_adapter(source, new, dtype, tokenizer)
        elif to == "hf":
            to_hf(source, new, dtype, tokenizer)
        else:
            step = to_run(source, new, dtype, tokenizer)
        replace(new, dst)
    return step


def write_files(source: Source, dst: Path, table: Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Writes a .bin and its table of tokens.

    Two files cannot change at once. While they do, the model has no table rather than another model's, and `repair`
    restores the older one or finishes.
    """
    with staged(dst) as new, staged(table) as new_table:
        to_llmc(source, new, dtype, tokenizer, new_table)
        old = sibling(table, "old")
        if table.exists() and not (new_table.exists() and table.read_bytes() == new_table.read_bytes()):
            table.rename(old)
            flush(table.parent)
        try:
            replace(new, dst)
        except BaseException:  # Ctrl-C, too; after the exchange the new model has its own table, or none
            if old.exists() and new.exists():
                old.rename(table)
            raise
        if new_table.exists():
            replace(new_table, table)
        old.unlink(missing_ok=True)


def repair(dst: Path, table: Path) -> None:
    """Ends what conversions to these names that were killed have begun, and removes what they left."""
    if not dst.parent.is_dir():
        return
    for pid in dead_writers(table, "old"):
        if not table.exists() and sibling(dst, "tmp", pid).exists():  # the older model is still there
            sibling(table, "old", pid).rename(table)
        elif not table.exists() and sibling(table, "tmp", pid).exists():
            sibling(table, "tmp", pid).rename(table)
        sibling(table, "old", pid).unlink(missing_ok=True)
    restore(dst)
    restore(table)
