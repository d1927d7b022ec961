"""What a report knows of a run: all that lies in its folder, read once."""

import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object
from handgrad.train.log_file import rows

SIZES = ("num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len")
# OpenAI's GPT-2: sizes, name, loss on the validation set of llm.c's notebook, HellaSwag accuracy by llm.c's rule
OPENAI: dict[tuple[object, ...], tuple[str, float, float]] = {
    (12, 12, 768, 50257, 1024): ("OpenAI GPT-2 124M", 3.424958, 0.294463),
    (24, 16, 1024, 50257, 1024): ("OpenAI GPT-2 355M", 3.083089, 0.375224),
    (36, 20, 1280, 50257, 1024): ("OpenAI GPT-2 774M", 3.000580, 0.431986),
    (48, 25, 1600, 50257, 1024): ("OpenAI GPT-2 1558M", 2.831273, 0.488946),
}


@dataclass(frozen=True)
class Points:
    """A logged figure: steps (n,) int64, and its values in them (n,) float64, all finite."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.steps)

    def __mul__(self, factor: float) -> "Points":
        return Points(self.steps, factor * self.values)

    def __getitem__(self, at: Any) -> "Points":
        """Some of the points, in the order of their numbers."""
        return Points(self.steps[at], self.values[at])


@dataclass(frozen=True)
class Log:
    """A log.jsonl: how many steps it has, its figures by name ("gpu.power" lies inside "gpu"), its events, and the
    numbers of its damaged rows.
    """

    steps: int
    figures: Mapping[str, Points]
    events: Sequence[dict]
    damaged: Sequence[int]


@dataclass(frozen=True)
class Run:
    """A run folder.

    log: log.jsonl
    config: config.json, the settings, nested;  summary: that of run.json, flat
    evals: eval.json: checkpoint -> task -> metric -> value
    sample, memory: texts, None where there is none
    """

    name: str
    log: Log
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    evals: Mapping[str, Any]
    sample: str | None
    memory: str | None

    def points(self, key: str) -> Points:
        """A figure wherever it was logged and is finite; "gpu.power" looks inside "gpu"."""
        return self.log.figures.get(key, Points())

    def sets(self) -> list[tuple[str, float, float, float]]:
        """The sets of a mixture: (name, share, tokens in it, epochs at the last logged step); none without a mixture.

        The newest attempt's event counts; the epochs since then are its share of the sequences, exact to one sequence.
        """
        told = next((event for event in reversed(self.log.events) if isinstance(event.get("sets"), list)), None)
        steps, found = self.points("seconds").steps, []
        for one in told["sets"] if told else ():
            keys = ("share", "tokens", "epochs", "epochs_per_step")
            figures = [number(one.get(key)) for key in keys] if isinstance(one, Mapping) else [None]
            if told and None not in figures:
                share, tokens, epochs, each = (value or 0.0 for value in figures)
                since = max(int(steps[-1]) - told["step"], 0) if len(steps) else 0
                found.append((str(one.get("name")), share, tokens, epochs + since * each))
        return found

    def hellaswag(self) -> Points:
        """Accuracy by llm.c's rule, as logged while training and as `handgrad eval` measured later."""
        logged = self.points("hellaswag")
        found = dict(zip(logged.steps.tolist(), logged.values.tolist()))
        for checkpoint, tasks in self.evals.items():
            task = tasks.get("hellaswag") if isinstance(tasks, Mapping) else None
            value = number(task.get("acc_llmc") if isinstance(task, Mapping) else None)
            step = checkpoint.removeprefix("step_")
            if value is not None and step.isdecimal() and len(step) < 19:  # below 2^63
                found[int(step)] = value
        return Points(np.array(sorted(found), np.int64), np.array([found[step] for step in sorted(found)], float))

    def median(self, key: str) -> float | None:
        """Of a logged value; None where there is none."""
        points = self.points(key)
        return float(np.median(points.values)) if len(points) else None

    def openai(self) -> tuple[str, float, float] | None:
        """OpenAI's model of the very same sizes: its name, loss and HellaSwag accuracy."""
        model = self.config.get("model")
        sizes = [model.get(name) for name in SIZES] if isinstance(model, Mapping) else []
        return OPENAI.get(tuple(sizes)) if all(type(size) is int for size in sizes) else None

    def batch_tokens(self) -> int | None:
        """Tokens in a step."""
        data = self.config.get("data")
        tokens = data.get("batch_tokens") if isinstance(data, Mapping) else None
        return tokens if type(tokens) is int and tokens > 0 else None


def read_run(folder: Path) -> Run:
    """Reads a run folder, of which any file may be missing. Raises HandgradError if one but the log is damaged."""
    log = read_columns(folder / "log.jsonl")
    summary = object_in(folder / "run.json").get("summary", {})
    if not isinstance(summary, Mapping):
        raise HandgradError("report", f"'summary' in {folder / 'run.json'} must be a JSON object", json.dumps(summary))
    return Run(
        name=folder.resolve().name,
        log=log,
        config=object_in(folder / "config.json"),
        summary=summary,
        evals=object_in(folder / "eval.json"),
        sample=read_text(folder / "sample.txt"),
        memory=read_text(folder / "memory.txt"),
    )


def read_columns(path: Path) -> Log:
    """Reads a log in one pass: a long run has hundreds of thousands of lines."""
    count, events, damaged = 0, [], []
    columns: dict[str, tuple[array, array]] = {}
    for at, _, line in rows(path):
        if line is None:
            damaged.append(at)
        elif "event" in line:
            events.append(line)
        else:
            count += 1
            for key, value in numbers(line):
                steps, values = columns.get(key) or columns.setdefault(key, (array("q"), array("d")))
                steps.append(line["step"])
                values.append(value)
    figures = {key: Points(np.array(steps), np.array(values)) for key, (steps, values) in columns.items()}
    return Log(count, figures, events, damaged)


def numbers(line: dict) -> Iterator[tuple[str, float]]:
    """The figures of a line of the log that are finite, with those inside "gpu"."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, v in value.items() if (found := number(v)) is not None)
        elif (found := number(value)) is not None:
            yield key, found


def number(value: Any) -> float | None:
    """A finite number as a float; None for all else."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # of an int
        return None


def read_text(path: Path) -> str | None:
    """The text of a file, None if there is none."""
    if not os.path.exists(path):
        return None
    require_file(path, path.name, "report")
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HandgradError("report", f"{path} must be readable", error.strerror) from None


def object_in(path: Path) -> dict:
    """The object in a JSON file, empty if there is no file."""
    return read_object(path, "report") if os.path.exists(path) else {}
