"""Writes a model from any source as a Hugging Face folder, a .bin of llm.c, a .gguf, or a run folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from handgrad import tokenizers
from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError
from handgrad.core.install import own_version
from handgrad.core.json_file import read_object
from handgrad.infer.adapters import write_peft
from handgrad.infer.load import TOKENIZER, Source
from handgrad.io import checkpoint, gguf, hf, llmc
from handgrad.io.format import Format
from handgrad.io.weights import NUMPY, with_rows
from handgrad.models import GPT2, declare, to_dict
from handgrad.models.registry import FAMILIES
from handgrad.ops.adamw.reference import split_weight

SETTINGS = "config.json"  # of a run folder


def to_hf(source: Source, folder: Path, dtype: str, tokenizer: tokenizers.Tokenizer | None) -> None:
    """Fills an empty folder so that transformers loads it."""
    if not source.model.hugging_face:
        family = source.model.family
        raise HandgradError("convert", f"Hugging Face's library has no model of the family '{family}'")
    form = Format(**source.model.hugging_face)
    ends = source.ends
    suppressed: list[int] = []
    begins: tuple[int, ...] = ()
    if tokenizer is not None:
        ends = tuple(id for id in tokenizer.ends if id < source.model.vocab_size)
        drawable = np.zeros(source.model.vocab_size, bool)
        known = tokenizer.drawable()[: drawable.size]
        drawable[: known.size] = known
        # cutting these rows off instead would change the probabilities of the others
        suppressed = np.flatnonzero(~drawable).tolist()
        tokenizers.to_folder(tokenizer, folder, source.template())
        begins = tokenizer.begins
    hf.write(folder, form, source.weights, dtype, ends, suppressed, begins)


def to_adapter(source: Source, folder: Path, dtype: str, tokenizer: tokenizers.Tokenizer | None) -> None:
    """Fills an empty folder with the adapter of a run, so that peft loads it onto the model that the run began with;
    beside it are the run's tokenizer and chat template."""
    assert source.lora is not None and source.tensors is not None
    settings = source.path.resolve().parent / SETTINGS
    init = read_object(settings, "convert").get("model", {}).get("init", "") if settings.exists() else ""
    base = "" if init in ("random", "llmc") else str(init).removeprefix("hf:")
    if tokenizer is not None:
        tokenizers.to_folder(tokenizer, folder, source.template())
    write_peft(folder, source.lora, source.model, source.tensors, dtype, base)


def num_adapter_params(source: Source) -> int:
    """Parameters of the adapter of a run."""
    adapters = source.lora.adapters(source.model) if source.lora else {}
    shapes = source.weights.shapes
    return sum(a.rank * (len(a.spans) * shapes[weight][1] + a.rows) for weight, a in adapters.items())


def to_llmc(source: Source, file: Path, dtype: str, tokenizer: tokenizers.Tokenizer | None, table: Path) -> None:
    """Writes a .bin, and the table of tokens that llm.c decodes with."""
    if source.model.family != GPT2.family:
        raise HandgradError("convert", "a model for llm.c is of the family gpt2", f"'{source.model.family}'")
    llmc.write_model(file, source.weights, dtype)
    if tokenizer is not None:
        tokens = [tokenizer.bytes_of(id) or b"\0" for id in range(tokenizer.vocab_size)]
        llmc.write_tokenizer(table, tokens, tokenizer.eot)


def to_gguf(source: Source, file: Path, dtype: str, tokenizer: tokenizers.Tokenizer | None) -> None:
    """Writes a .gguf, which llama.cpp runs. dtype: "f32", "f16", "bf16" or "q8_0"."""
    form = Format(**source.model.hugging_face) if source.model.hugging_face else None
    if form is None or form.gguf is None:
        known = [cls.family for cls in FAMILIES.values() if cls.hugging_face.get("gguf")]
        raise HandgradError(
            "convert", f"a .gguf holds a {' or a '.join(known)}", f"a {source.model.family}", hint="--to hf"
        )
    if tokenizer is None:
        raise HandgradError("convert", "a .gguf holds a tokenizer", "a model without one", hint="--to hf needs none")
    about = tokenizers.to_gguf(tokenizer, source.model.vocab_size, source.template())
    gguf.write(file, form, source.weights, dtype, about)


def to_run(source: Source, folder: Path, dtype: str, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Fills an empty run folder with one checkpoint; returns its step.

    If llm.c's training states lie beside the model, the checkpoint continues them with their m, v and master weights;
    otherwise it is of step 0, without optimizer state.

    Two things that llm.c saves have no counterpart here: its loader's order (ours is a permutation of the whole data,
    and starts anew), and the random numbers of its stochastic rounding (ours are functions of the step, and master
    weights are rounded to nearest). llm.c does not save the learning rate, weight decay or any other setting.
    """
    files = llmc.state_files(source.path) if source.kind == "llmc" else []
    state = llmc.read_state(source.path, files) if files else None
    has_master = state is not None and "master" in state.flats
    values: dict[str, dict[str, np.ndarray]] = {"param": {}, "m": {}, "v": {}, "low": {}}
    for name, info in declare(source.model).params.items():
        rows, used = info.tensor.shape[0], source.weights.shapes[name][0]
        weight = source.weights.tensor(name, "f32", rows)
        if state is not None:
            # rows of padding have no gradient and are 0; the file may have another number of them
            read = {flat: with_rows(state.read(flat, name)[:used], rows) for flat in state.flats}
            values["m"][name], values["v"][name] = read["m"], read["v"]
            weight = read.get("master", weight)
            if dtype == "bf16" and has_master:
                weight, values["low"][name] = split_weight(weight)
        values["param"][name] = weight.astype(NUMPY[dtype], copy=False)
    step = 0 if state is None else state.step
    params = values.pop("param")
    flats = {f"{flat}.{name}": x for flat, named in values.items() for name, x in named.items()}
    meta = {
        **to_dict(source.model),
        "dtype": dtype,
        "stored": NUMPY[dtype].name,
        "config": {},
        "tokens": 0,  # none has been read in our order
        "outliers": {},
        "skips": 0,
        "versions": {"handgrad": own_version()},
        "converted_from": str(source.path),
        "ends": source.ends,
    }
    checkpoint.save(folder, step, params, flats, meta)
    if tokenizer is not None:
        write_text(folder / TOKENIZER, json.dumps(tokenizer.save(folder)) + "\n")
        source.template().save(folder)
    if state is not None:  # settings that the flags of the resumed run override
        settings: dict[str, Any] = {"model": asdict(source.model), "data": {}, "optim": {"beta2": 0.95}}
        settings["run"] = {"dtype": dtype, "master_weights": has_master or dtype == "f32"}
        write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    return step
