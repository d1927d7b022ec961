"""The curves of a report, as data: what page.js draws.

{"runs": [{"name", "batch_tokens" or null, "seconds": [steps, seconds]}],
 "panels": [{"title", "wide", "log", "zero", "tail", "series": [...], "lines": [...], "marks": [...]}]}

series  {"run": index, "colour": number, "kind": "raw" | "line" | "dots", "label", "x": steps, "y": values}
        raw: single steps, faint, behind their running mean
lines   {"label", "y"}: horizontal, for comparison
marks   {"run", "x", "text"}: events
tail    the y axis leaves out the first steps, where a loss falls from far above
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from handgrad.train.report.read import Points, Run

POINTS = 400  # of a curve: about what a screen can show
EVENTS = 500  # of a run
GPU = {  # of log.jsonl's "gpu": title, factor
    "memory": ("GPU memory in use, GiB", 1 / 1024),
    "power": ("GPU power, W", 1),
    "temperature": ("GPU temperature, °C", 1),
    "clock": ("GPU clock, MHz", 1),
}


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """What there is to draw of these runs; a panel for nothing is left out."""
    about = [{"name": run.name, "batch_tokens": run.batch_tokens(), "seconds": _seconds(run)} for run in runs]
    return {"runs": about, "panels": [panel for panel in _panels(runs) if panel["series"]]}


def _panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One run has its two losses in one panel; those of several would hide each other."""
    openai = sorted({line for run in runs if (line := run.openai())})
    loss_lines = [{"label": name, "y": loss} for name, loss, _ in openai]
    marks = [
        {"run": i, "x": event["step"], "text": str(event["event"])}
        for i, run in enumerate(runs)
        for event in run.log.events[:EVENTS]
    ]
    loss = [s for i, run in enumerate(runs) for s in _noisy(run.points("loss"), i, "train")]
    val = [s for i, run in enumerate(runs) for s in _series(run.points("val_loss"), i, "validation", "dots")]
    units = {_unit(run) for run in runs}
    of = units.pop() if len(units) == 1 else "nats per token"
    if len(runs) == 1:
        val = [one | {"colour": 1} for one in val]
        first = [_panel(f"Loss, {of}", loss + val, loss_lines if val else [], marks, wide=True, tail=True)]
    else:
        first = [
            _panel(f"Training loss, {of}", loss, [], marks, wide=True, tail=True),
            _panel(f"Validation loss, {of}", val, loss_lines, [], wide=True, tail=True),
        ]
    measured = [s for i, run in enumerate(runs) for s in _series(run.hellaswag() * 100, i, "", "dots")]
    right = [s for i, run in enumerate(runs) for s in _series(run.points("val_acc") * 100, i, "", "dots")]
    norm = [s for i, run in enumerate(runs) for s in _noisy(run.points("grad_norm"), i)]
    norms = [y for one in norm for y in one["y"]]
    is_wide = bool(norms) and min(norms) > 0 and max(norms) > 10 * min(norms)
    rest = [
        _panel("Validation accuracy, %", right),
        _panel("HellaSwag accuracy, %", measured, [{"label": name, "y": 100 * share} for name, _, share in openai]),
        _panel("Gradient norm, before clipping", norm, log=is_wide),
        _panel("Learning rate", _each(runs, "lr"), zero=True),
        _panel("Throughput, tokens per second", _each(runs, "tokens_per_second"), zero=True),
    ]
    gpu = [_panel(title, _each(runs, f"gpu.{key}", factor), zero=True) for key, (title, factor) in GPU.items()]
    return first + rest + gpu


def _unit(run: Run) -> str:
    """What the losses of a run are."""
    if "labels" in run.summary:
        return "squared error" if run.summary["labels"] == 1 else "nats per text"
    return "nats per token of the assistant" if "chat" in run.summary else "nats per token"


def _panel(title: str, series: list, lines: Sequence = (), marks: Sequence = (), **how: bool) -> dict[str, Any]:
    flags = {"wide": False, "log": False, "zero": False, "tail": False}
    return {"title": title, **flags, **how, "series": series, "lines": list(lines), "marks": list(marks)}


def _each(runs: Sequence[Run], key: str, factor: float = 1) -> list[dict[str, Any]]:
    return [s for i, run in enumerate(runs) for s in _series(run.points(key) * factor, i)]


def _series(points: Points, run: int, label: str = "", kind: str = "line") -> list[dict[str, Any]]:
    """The curve of these points, none if there are none."""
    points = thin(points)
    values = [float(f"{value:.6g}") for value in points.values.tolist()]
    curve = {"run": run, "colour": run, "kind": kind, "label": label, "x": points.steps.tolist(), "y": values}
    return [curve] if values else []


def _noisy(points: Points, run: int, label: str = "") -> list[dict[str, Any]]:
    """Single steps behind their mean over a fiftieth of the run; only the steps where a mean would blur them."""
    means, window = running_mean(points)
    if window == 1:
        return _series(points, run, label)
    return [*_series(points, run, kind="raw"), *_series(means, run, label and f"{label}, mean of {window} steps")]


def running_mean(points: Points) -> tuple[Points, int]:
    """(means, how many points a mean takes).

    The window is centred, so that a mean does not lag; it shrinks at the start, and at the end loses its right half.

    >>> running_mean(Points(np.arange(300), 2.0 * np.arange(300)))[0].values[:2].tolist()
    [0.0, 2.0]
    """
    reach, values = len(points) // 100, points.values
    window = 2 * reach + 1
    with np.errstate(over="ignore", invalid="ignore"):
        first = np.cumsum(values[:window])[::2] / np.arange(1, window + 1, 2)
        last = (np.cumsum(values[::-1][:window]) / np.arange(1, window + 1))[reach : 2 * reach][::-1]
        means = np.concatenate([first, _window_sums(values, window)[1:] / window, last])
    kept = np.isfinite(means)  # sums of very large values may overflow
    return Points(points.steps[kept], means[kept]), window


def _window_sums(values: np.ndarray, window: int) -> np.ndarray:
    """The sums of every `window` neighbours.

    Each is the end of one block of `window` values and the beginning of the next: differences of sums from the start
    would cancel after a spike.
    """
    blocks = np.pad(values, (0, -len(values) % window)).reshape(-1, window)
    begins = np.cumsum(blocks, axis=1).reshape(-1)
    ends = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].reshape(-1)
    left = np.arange(len(values) - window + 1)
    return begins[left + window - 1] + np.where(left % window == 0, 0.0, ends[left])


def thin(points: Points) -> Points:
    """At most about 2 POINTS of a curve: the lowest and the highest of each window, so that no spike is lost; and both
    ends.
    """
    count = len(points)
    size = -(-count // POINTS)
    if size <= 2:
        return points
    starts = np.arange(0, count, size)
    windows = np.full((len(starts), size), points.values[-1])  # the last one is filled up with its last value
    windows.flat[:count] = points.values
    kept = np.unique(np.concatenate([[0, count - 1], *(starts + find(windows, 1) for find in (np.argmin, np.argmax))]))
    return points[kept[kept < count]]


def _seconds(run: Run) -> list[list[float]]:
    """[steps, seconds since the start], at most about POINTS of either."""
    points, count = run.points("seconds"), len(run.points("seconds"))
    some = points[np.unique([*range(0, count, -(-count // POINTS) or 1), *range(count)[-1:]]).astype(int)]
    return [some.steps.tolist(), some.values.tolist()]
