"""Tuning: which parameters of a model learn, and the adapters beside it, from settings and from `Execution`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from handgrad.core.dtypes import DType
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.program import Program
from handgrad.infer.adapters import lora_of
from handgrad.models import Lora, Model, declare
from handgrad.models.lora import CLASSIFIER, tensors
from handgrad.train.config import TuneConfig
from handgrad.train.execution import Execution


def settled(t: TuneConfig, is_resumed: bool) -> TuneConfig:
    """The settings, with those of the adapter that a new run starts from."""
    if not t.lora_init or is_resumed:
        return t
    found = lora_of(Path(t.lora_init))
    brought: dict[str, Any] = {"lora_rank": found.rank, "lora_alpha": found.alpha, "lora_dropout": found.dropout}
    brought["lora_targets"] = ",".join(found.targets)
    for name, value in brought.items():
        if getattr(t, name) not in (getattr(TuneConfig, name), value):
            rule = f"--{name.replace('_', '-')} is left to the adapter that --lora-init names, which has {value}"
            raise HandgradError("lora", rule, getattr(t, name))
    return replace(t, **brought)


def tuned(execution: Execution, t: TuneConfig) -> Execution:
    """An execution in which what these settings name learns."""
    lora = Lora(t.lora_rank, t.lora_alpha, words(t.lora_targets), t.lora_dropout) if t.lora_rank else None
    return replace(execution, train_only=words(t.train_only), lora=lora)


def tune_settings(execution: Execution) -> dict[str, Any]:
    """The settings that stand for what learns in an execution, by name."""
    found: dict[str, Any] = {"train_only": ",".join(execution.train_only)}
    if lora := execution.lora:
        found |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        found["lora_targets"] = ",".join(lora.targets)
    return found


def words(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def adapters_of(model: Model, execution: Execution) -> Mapping[str, Any]:
    """The adapters of a run's programs, by weight."""
    return execution.lora.adapters(model) if execution.lora else {}


def declared(model: Model, execution: Execution, dtype: DType) -> Program:
    """A program that declares every parameter of a run."""
    return declare(model, dtype, adapters_of(model, execution))


def learns(model: Model, execution: Execution) -> Callable[[str], bool]:
    """Whether a parameter learns, by its name: if there are adapters, these and a classifier's head, which no adapter
    changes and a new run draws; else what `train_only` matches.

    Raises HandgradError for a pattern that matches no parameter.
    """
    if execution.lora:
        own = {name for weight in adapters_of(model, execution) for name in tensors(weight)}
        return lambda name: name in own or name.startswith(CLASSIFIER)
    patterns = execution.train_only
    names = list(declare(model).params) if patterns else []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(dict.fromkeys(".*.".join(_around_number(name)) for name in names))
            hint = did_you_mean(pattern, names)
            rule = f"train_only matches parameters of the model: {known}"
            raise HandgradError("train", rule, f"'{pattern}'", hint=hint)
    return lambda name: not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _around_number(name: str) -> list[str]:
    """The parts of a name before and after the number of its block."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return [name] if at is None else [".".join(words[:at]), ".".join(words[at + 1 :])]
