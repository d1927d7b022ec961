"""handgrad convert SRC DST: a model between llm.c's .bin, Hugging Face folders and handgrad's run folders."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.infer.convert import to_hf, to_llmc, to_run
from handgrad.infer.load import open_source

OF_A_MODEL = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "step_*",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Convert:
    """Source, destination and format."""

    src: Annotated[str, tyro.conf.Positional]
    """run folder, one of its checkpoints, a .bin of llm.c or its training folder, a Hugging Face folder, hf:NAME"""
    dst: Annotated[str, tyro.conf.Positional]
    """a new folder, or FILE.bin for llm.c"""
    to: Literal["auto", "hf", "llmc", "handgrad"] = "auto"
    """format; auto: llmc for FILE.bin, hf for a run folder, otherwise handgrad"""
    dtype: Literal["saved", "f32", "bf16"] = "saved"
    """dtype of the written weights; saved: the source's"""
    force: bool = False
    """replace a file, or a folder that holds only a model"""


def main(argv: list[str]) -> int:
    """Converts. The destination changes only when everything has been written."""
    a = parse(Convert, argv, "convert")
    dst, to, source = Path(a.dst), a.to, open_source(a.src)
    if to == "auto":
        to = "llmc" if dst.suffix == ".bin" else "hf" if source.kind == "handgrad" else "handgrad"
    if (to == "llmc") != (dst.suffix == ".bin"):
        raise HandgradError("convert", "llm.c's models are files FILE.bin, all others folders", f"'{dst}' for {to}")
    dtype = source.weights.dtype if a.dtype == "saved" else a.dtype
    try:
        tokenizer = source.tokenizer()
    except HandgradError as error:
        tokenizer = None
        print(f"no tokenizer: {error}")
    table, step = dst.with_name(f"{dst.stem}_tokenizer.bin"), 0
    for path in (dst, table) if to == "llmc" else (dst,):
        check_free(path, a.force)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        if to == "llmc":
            with replacing(table) as new_table, replacing(dst) as new:
                to_llmc(source, new, dtype, tokenizer, new_table)
        else:
            with replacing(dst) as new:
                new.mkdir()
                if to == "hf":
                    to_hf(source, new, dtype, tokenizer)
                else:
                    step = to_run(source, new, dtype, tokenizer)
    except OSError as error:
        raise HandgradError("convert", f"cannot write '{dst}': {error.strerror or error}") from None
    count = sum(math.prod(shape) for shape in source.weights.shapes.values())
    print(f"{dst}: {count:,} parameters, {dtype}, from {source.path}")
    if step:
        print(f"resume: handgrad train --resume {dst} --steps N --train DATA")
    elif to != "hf":
        print(f"train from it: handgrad train --init {dst} --train DATA")
    return 0


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write under. At the end of the block, what was written there replaces `path`."""
    new, old = (path.with_name(f"{path.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    try:
        yield new
        if new.is_dir() and path.exists():  # rename does not replace a folder
            path.rename(old)
        if new.exists():
            new.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (new, old):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
