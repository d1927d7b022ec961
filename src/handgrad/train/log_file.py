"""The files of a log: the lines of log.jsonl, and those of llm.c's main.log."""

import json
import math
import operator
from pathlib import Path

from handgrad.core.disk import write_whole
from handgrad.core.errors import HandgradError

KEYS = ("loss", "val_loss", "hellaswag", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")


def read_log(path: str | Path) -> list[dict]:
    """Returns the lines of a log.jsonl in order, as dicts; none if there is no file.

    A last line that a crash tore is left out. Raises HandgradError if another line is not a JSON object with a step.
    """
    try:
        rows = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HandgradError("log", f"{path} must be readable", error.strerror) from None
    lines = []
    for number, row in enumerate(rows, 1):
        line = _parse(row)
        if line is not None:
            lines.append(line)
        elif row and any(rows[number:]):
            rule = f"every line of {path} must be a JSON object with a step"
            raise HandgradError("log", rule, f"{row[:40]!r} in line {number}", hint="repair it or move it away")
    return lines


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
        loss, norm = (math.nan if line[key] is None else line[key] for key in ("loss", "grad_norm"))
        text += f"s:{step - 1} trl:{loss:.4f} lr:{line['lr']:.6f} norm:{norm:.2f}\n"
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
        line |= {key: float(line[key]) for key in KEYS if line.get(key) is not None}
        return line if 0 <= operator.index(line["step"]) < 2**63 else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def drop_after(path: Path, step: int) -> list[dict]:
    """Rewrites a log without the lines of later steps and without a torn end; returns the lines that stay."""
    lines = [line for line in read_log(path) if line["step"] <= step]
    write_whole(path, map(dump, lines))
    return lines
