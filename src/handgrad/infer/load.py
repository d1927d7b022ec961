"""load_run: an engine and its tokenizer from a run folder."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from handgrad import tokenizers
from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.infer.engine import Engine, record
from handgrad.io import checkpoint
from handgrad.models import GPT2

TOKENIZER = "tokenizer-spec.json"  # in the run folder: what tokenizers.load reads
ON_DISK = {"bf16": "bfloat16", "f32": "float32"}


def load_run(
    path: Path, dtype: str = "saved", backend: str = "cpu", threads: int = 0
) -> tuple[Engine, tokenizers.Tokenizer]:
    """(engine, tokenizer) of a run folder's newest checkpoint, or of the checkpoint `path` itself.

    dtype: "f32", "bf16", or "saved" for the one it was trained in. Raises HandgradError where something is missing.
    """
    if not path.is_dir():
        raise HandgradError("generate", "a run folder is a folder", f"no '{path}'", hint="handgrad train makes one")
    folder = path if path.resolve().name.startswith("step_") else checkpoint.newest(path)
    if folder is None:
        raise HandgradError("generate", "a run folder holds a complete checkpoint", f"none in '{path}'")
    model, saved_as, stored = _described(folder)
    tokenizer = _tokenizer(folder.resolve().parent)
    kind = saved_as if dtype == "saved" else dtype
    engine_backend = open_backend(backend, threads)
    prefill, decode = programs = record(model, DTYPES[kind])
    params = {name: info.tensor for name, info in decode.params.items()}
    tensors = checkpoint.load(folder, {name: (t.shape, stored) for name, t in params.items()})
    arena = engine_backend.alloc(engine_backend.plan(decode, prefill))
    for name, t in params.items():
        arena.write_part("param", t, np.asarray(tensors[name]))
    return Engine(model, programs, arena, engine_backend), tokenizer


def _described(folder: Path) -> tuple[GPT2, str, str]:
    """(model, working dtype, dtype on disk) that a checkpoint says it holds; the ref backend stores float64."""
    saved = checkpoint.load_meta(folder, {"model": dict, "dtype": str})
    known = {f.name: f.type for f in fields(GPT2)}
    for name in known.keys() ^ saved["model"].keys():
        rule = f"{folder}/run.json gives {', '.join(known)}"
        raise HandgradError("generate", rule, f"{'no ' if name in known else ''}{name!r}")
    for name, value in saved["model"].items():
        if type(value) is not known[name]:
            raise HandgradError("generate", f"{folder}/run.json gives {name} as {known[name].__name__}", repr(value))
    if saved["dtype"] not in ON_DISK:
        rule = f"{folder}/run.json gives a dtype of {', '.join(ON_DISK)}"
        raise HandgradError("generate", rule, repr(saved["dtype"]))
    stored = "float64" if saved.get("stored") == "float64" else ON_DISK[saved["dtype"]]
    return GPT2(**saved["model"]), saved["dtype"], stored


def _tokenizer(run: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a run folder."""
    path = run / TOKENIZER
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "checkpoints are read inside their run folder"
        raise HandgradError("generate", f"{path} says how text becomes tokens", "no such file", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise HandgradError("generate", f"{path} is JSON", error) from None
    return tokenizers.load(spec, run)
