"""peft's folders: adapter_config.json and adapter_model.safetensors of a LoRA adapter, by Hugging Face's names."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.core.disk import flush, write_text
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object, shown
from handgrad.io import hf
from handgrad.io.format import DTYPES

MODEL = "adapter_model.safetensors"
BASE = "adapter_base.json"  # ours: peft leaves it alone, and would warn of a key that it does not know in its own file
PREFIX = "base_model.model."  # of every name: peft wraps the model twice
NEUTRAL: dict[str, tuple] = {  # keys that change the computation: the values that change nothing, the default first
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "modules_to_save": (None, []),
    "exclude_modules": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says: the fields of a Lora, and the model that the adapter was made for."""

    rank: Any
    alpha: Any
    dropout: Any
    targets: tuple[str, ...]
    base: str = ""


def is_folder(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / hf.ADAPTER).is_file()


def read_settings(path: Path) -> Settings:
    """The settings of the adapter in a folder, unchecked. Raises HandgradError if there is none, or our kernels do not
    compute it."""
    if not is_folder(path):
        raise HandgradError("lora", f"an adapter is a folder with {hf.ADAPTER} and {MODEL}", f"'{path}'")
    config = read_object(path / hf.ADAPTER, "lora")
    for key, values in NEUTRAL.items():
        if config.get(key, values[0]) not in values:
            rule = f"{path / hf.ADAPTER} has {key} {' or '.join(str(value) for value in values)}"
            raise HandgradError("lora", rule, shown(config[key]), hint="no kernel here computes another")
    targets = config.get("target_modules")
    targets = [targets] if targets == "all-linear" else targets
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise HandgradError("lora", f"{path / hf.ADAPTER} lists its target_modules", shown(targets))
    base = config.get("base_model_name_or_path")
    values = (config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0))
    return Settings(*values, tuple(sorted(targets)), base if isinstance(base, str) else "")


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of the adapter in a folder, float32, by their names without the prefix.

    Raises HandgradError unless it holds tensors of these names and shapes alone: another is of another model.
    """
    file = path / MODEL
    if not file.is_file():
        hint = "peft writes it by default" if (path / "adapter_model.bin").exists() else ""
        raise HandgradError("lora", f"an adapter is a folder with {hf.ADAPTER} and {MODEL}", f"no {file}", hint=hint)
    found = {stored.name: stored for stored in hf.stored_tensors(file)}
    wanted = {PREFIX + name: shape for name, shape in shapes.items()}
    rule = f"'{path}' is an adapter of this model"
    for name in sorted(wanted.keys() ^ found.keys()):
        raise HandgradError("lora", rule, f"{'no' if name in wanted else 'also'} {shown(name)}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise HandgradError("lora", rule, f"{name} of shape {found[name].shape}, not {shape}")
        if found[name].dtype not in DTYPES:
            raise HandgradError("lora", f"tensors in {file} are {', '.join(DTYPES)}", found[name].dtype)
    return {name.removeprefix(PREFIX): found[name].read().astype(np.float32) for name in wanted}


def read_base(path: Path) -> dict[str, np.ndarray] | None:
    """Values of some weights of the model that the adapter in a folder was trained on, by name; None if it has none.

    Raises HandgradError if they are damaged.
    """
    if not os.path.lexists(path / BASE):
        return None
    found = read_object(path / BASE, "lora")
    for name, values in found.items():
        if not isinstance(values, list) or not values or not all(type(x) is float and isfinite(x) for x in values):
            rule = f"{path / BASE} gives finite numbers of each weight"
            raise HandgradError("lora", rule, f"{shown(name)}: {shown(values)}", hint="an adapter needs no such file")
    return {name: np.array(values) for name, values in found.items()}


def write_base(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Writes beside an adapter what `read_base` reads, with six digits."""
    text = {name: [float(f"{x:.6g}") for x in run] for name, run in values.items()}
    write_text(path / BASE, json.dumps(text) + "\n")


def write(
    path: Path,
    settings: Settings,
    task: str | None,
    tensors: Mapping[str, tuple[int, ...]],
    values: Iterator[np.ndarray],
    dtype: str,
) -> None:
    """Writes an adapter into a folder, so that peft loads it.

    task: peft's task_type;  tensors: shapes by name, without the prefix;  values: the tensors, in this order
    dtype: "f32" or "bf16", theirs
    """
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": settings.base or None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_text(path / hf.ADAPTER, json.dumps(config, indent=2) + "\n")
    parts = [(PREFIX + name, shape) for name, shape in tensors.items()]
    hf.write_file(path / MODEL, parts, zip(tensors, values), dtype)
    flush(path)
