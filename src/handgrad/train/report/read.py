"""What a report knows of a run: all that lies in its folder, read once."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.train.log_file import read_log

Points = Sequence[tuple[int, float]]  # (step, value)

SIZES = ("num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len")
# OpenAI's GPT-2: sizes, name, loss on the validation set of llm.c's notebook, HellaSwag accuracy by llm.c's rule
OPENAI: dict[tuple[object, ...], tuple[str, float, float]] = {
    (12, 12, 768, 50257, 1024): ("OpenAI GPT-2 124M", 3.424958, 0.294463),
    (24, 16, 1024, 50257, 1024): ("OpenAI GPT-2 355M", 3.083089, 0.375224),
    (36, 20, 1280, 50257, 1024): ("OpenAI GPT-2 774M", 3.000580, 0.431986),
    (48, 25, 1600, 50257, 1024): ("OpenAI GPT-2 1558M", 2.831273, 0.488946),
}


@dataclass(frozen=True)
class Run:
    """A run folder.

    steps, events: lines of log.jsonl of either kind
    config: config.json, the settings, nested;  summary: that of run.json, flat
    evals: eval.json: checkpoint -> task -> metric -> value
    sample, memory: texts, None where there is none
    """

    name: str
    steps: list[dict]
    events: list[dict]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    evals: Mapping[str, Any]
    sample: str | None
    memory: str | None

    def points(self, key: str, scale: float = 1.0) -> Points:
        """(step, value) wherever a value was logged and is finite; "gpu.power" looks inside "gpu"."""
        outer, _, inner = key.partition(".")
        found = []
        for line in self.steps:
            value = line.get(outer)
            value = value.get(inner) if inner and isinstance(value, Mapping) else value
            if isinstance(value, int | float) and math.isfinite(value):
                found.append((line["step"], scale * value))
        return found

    def hellaswag(self) -> Points:
        """(step, accuracy by llm.c's rule), as logged while training and as `handgrad eval` measured later."""
        found = dict(self.points("hellaswag"))
        for checkpoint, tasks in self.evals.items():
            task = tasks.get("hellaswag") if isinstance(tasks, Mapping) else None
            value = task.get("acc_llmc") if isinstance(task, Mapping) else None
            step = checkpoint.removeprefix("step_")
            if isinstance(value, int | float) and step.isdecimal():
                found[int(step)] = float(value)
        return sorted(found.items())

    def median(self, key: str) -> float | None:
        """Of a logged value; None where there is none."""
        values = [value for _, value in self.points(key)]
        return statistics.median(values) if values else None

    def openai(self) -> tuple[str, float, float] | None:
        """OpenAI's model of the very same sizes: its name, loss and HellaSwag accuracy."""
        model = self.config.get("model")
        return OPENAI.get(tuple(model.get(name) for name in SIZES)) if isinstance(model, Mapping) else None

    def batch_tokens(self) -> int | None:
        """Tokens in a step."""
        data = self.config.get("data")
        tokens = data.get("batch_tokens") if isinstance(data, Mapping) else None
        return tokens if type(tokens) is int and tokens > 0 else None


def read_run(folder: Path) -> Run:
    """Reads a run folder, of which any file may be missing. Raises HandgradError if one is damaged."""
    lines = read_log(folder / "log.jsonl")
    summary = read_object(folder / "run.json").get("summary", {})
    if not isinstance(summary, Mapping):
        raise HandgradError("report", f"'summary' in {folder / 'run.json'} must be a JSON object", json.dumps(summary))
    return Run(
        name=folder.resolve().name,
        steps=[line for line in lines if "event" not in line],
        events=[line for line in lines if "event" in line],
        config=read_object(folder / "config.json"),
        summary=summary,
        evals=read_object(folder / "eval.json"),
        sample=read_text(folder / "sample.txt"),
        memory=read_text(folder / "memory.txt"),
    )


def read_text(path: Path) -> str | None:
    """The text of a file, None if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HandgradError("report", f"{path} must be readable", error.strerror) from None


def read_object(path: Path) -> dict:
    """The object in a JSON file, empty if there is no file."""
    try:
        value = json.loads(read_text(path) or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HandgradError("report", f"{path} must hold a JSON object", "something else")
    return value
