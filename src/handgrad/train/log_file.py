"""The files of a log: the lines of log.jsonl, and those of llm.c's main.log."""

import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from handgrad.core.disk import require_file, write_whole
from handgrad.core.errors import HandgradError

KEYS = ("loss", "val_loss", "val_acc", "hellaswag", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")


class Row(NamedTuple):
    """A row of a log.jsonl: its number from 1, its bytes, and what it says; None if that is no line of a log."""

    number: int
    raw: bytes
    line: dict | None


def rows(path: str | Path) -> Iterator[Row]:
    """The rows of a log.jsonl in order; none if there is no file. A last row that a crash tore is left out.

    Raises HandgradError if the file cannot be read.
    """
    if not os.path.exists(path):
        return
    require_file(path, Path(path).name, "log")
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, 1):
                line, is_whole = _parse(raw), raw.endswith(b"\n")
                if line is not None or (is_whole and raw.strip()):
                    yield Row(number, raw if is_whole else raw + b"\n", line)
    except OSError as error:
        raise HandgradError("log", f"{path} must be readable", error.strerror) from None


def read_log(path: str | Path) -> list[dict]:
    """Returns the lines of a log.jsonl in order, as dicts; none if there is no file.

    A row that is no JSON object with a step, such as a last one that a crash tore, is left out.
    """
    return [row.line for row in rows(path) if row.line is not None]


def abbreviated(numbers: Sequence[int]) -> str:
    """Which rows or steps: all of a few, the ends of many.

    >>> abbreviated([4]), abbreviated([4, 9, 11]), abbreviated(range(9, 13))
    ('4', '4, 9, 11', '9, 10, 11, 12')
    >>> abbreviated(range(9, 1013))
    '9, 10, 11 .. 1012'
    """
    few = ", ".join(map(str, numbers[:3] if len(numbers) > 5 else numbers))
    return f"{few} .. {numbers[-1]}" if len(numbers) > 5 else few


def main_log(line: dict) -> str:
    """What llm.c writes into its main.log, and its notebook reads, for a line of log.jsonl; nothing for an event.

    llm.c counts updates from 0: the loss of our update k stands at k - 1, what was measured after it at k.

    >>> line = {"step": 20, "loss": 4.53108, "val_loss": 4.5, "hellaswag": 0.25, "lr": 6e-4, "grad_norm": 1.347}
    >>> print(main_log(line), end="")
    s:19 trl:4.5311 lr:0.000600 norm:1.35
    s:20 tel:4.5000
    s:20 eval:0.2500
    """
    step, text = line["step"], ""
    if "loss" in line:
        loss, lr, norm = (math.nan if line.get(key) is None else line[key] for key in ("loss", "lr", "grad_norm"))
        text += f"s:{step - 1} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}\n"
    for key, name in (("val_loss", "tel"), ("hellaswag", "eval")):
        text += f"s:{step} {name}:{line[key]:.4f}\n" if line.get(key) is not None else ""
    return text


def dump(line: dict) -> bytes:
    """One line of the log. JSON has no NaN and no infinity: they become null."""
    numbers = {key: None for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(line | numbers, allow_nan=False).encode() + b"\n"


def _parse(row: bytes) -> dict | None:
    """The dict of one line, its measured values as floats or None; None for what is no line of a log."""
    try:
        line = json.loads(row)
        for key in KEYS:
            value = line.get(key)
            if value is not None and type(value) is not float:
                line[key] = float(value)
        return line if 0 <= operator.index(line["step"]) < 2**63 else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def drop_after(path: Path, step: int) -> tuple[list[dict], list[int]]:
    """Rewrites a log without the lines of later steps and without a torn end.

    Returns the lines that stay, and the numbers of the rows that were no lines: those are moved to <path>.bad.
    """
    kept, bad = [], []
    for row in rows(path):
        if row.line is None:
            bad.append(row)
        elif row.line["step"] <= step:
            kept.append(row)
    if bad:
        aside = path.with_name(f"{path.name}.bad")
        write_whole(aside, [*(row.raw for row in rows(aside)), *(row.raw for row in bad)])
    write_whole(path, [row.raw for row in kept])
    return [row.line for row in kept if row.line is not None], [row.number for row in bad]
