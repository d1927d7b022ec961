"""load_run: an engine and its tokenizer from a run folder."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.plan import plan
from handgrad.infer.engine import Engine, record
from handgrad.io import checkpoint
from handgrad.models import GPT2

KINDS = {"bf16": "bfloat16", "f32": "float32"}


def load_run(path: Path, dtype: str = "saved", backend: str = "cpu", threads: int = 0) -> tuple[Engine, tokenizers.Tokenizer]:
    """(engine, tokenizer) of a run folder's newest checkpoint, or of the checkpoint `path` itself.

    dtype: "f32", "bf16", or "saved" for the one it was trained in. Raises HandgradError where something is missing.
    """
    if not path.is_dir():
        raise HandgradError("generate", "a run folder is a folder", f"no '{path}'", hint="handgrad train makes one")
    folder = path if path.name.startswith("step_") else checkpoint.newest(path)
    if folder is None:
        raise HandgradError("generate", "a run folder holds a complete checkpoint", f"none in '{path}'")
    saved = checkpoint.load_meta(folder, {"model": dict, "dtype": str})
    known = {f.name for f in fields(GPT2)}
    if set(saved["model"]) != known or saved["dtype"] not in KINDS:
        raise HandgradError("generate", f"{folder}/run.json describes a GPT2", sorted(set(saved["model"]) ^ known))
    try:
        model = GPT2(**saved["model"])
    except TypeError as error:
        raise HandgradError("generate", f"{folder}/run.json describes a GPT2", error) from None
    kind = saved["dtype"] if dtype == "saved" else dtype
    engine_backend = open_backend(backend, threads)
    programs = record(model, DTYPES[kind])
    layout = plan(programs[1], programs[0], scratch=engine_backend.scratch)
    expected = {name: (info.tensor.shape, KINDS[saved["dtype"]]) for name, info in programs[1].params.items()}
    tensors = checkpoint.load(folder, expected)
    arena = engine_backend.alloc(layout)
    for name, info in programs[1].params.items():
        target = arena.part("param", info.tensor)
        target[...] = np.asarray(tensors[name]).astype(target.dtype)
    return Engine(model, programs, arena, engine_backend), _tokenizer(folder.parent)


def _tokenizer(run: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a run folder; GPT-2's where the data said nothing."""
    path = run / "tokenizer-spec.json"
    if not path.exists():
        return tokenizers.gpt2()
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HandgradError("generate", f"{path} is JSON", error) from None
    return tokenizers.load(spec, run)
