"""The log of a run: a JSON object a step in log.jsonl, llm.c's lines in main.log, a live line on a terminal."""

import json
import math
import operator
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handgrad.core.errors import HandgradError
from handgrad.train.telemetry import in_words
from handgrad.train.trackers import TensorBoard, Wandb

KEYS = ("loss", "val_loss", "hellaswag", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")
PLAIN_SECONDS = 5.0  # between lines where nobody watches live
LIVE_WIDTH = 92  # columns that the live line takes in a long run, without its bar
LIVE_SECONDS = 0.1  # between redraws of the live line: one takes 0.4 ms from the kernels
RATE_DECAY = 0.95  # of the running mean of tokens per second, per step


class RunLog:
    """Writes and shows what a run does, step by step. A context manager; `close` ends the live line.

    out_dir: the run folder; log.jsonl and main.log (see `main_log`) lie there, and with `tensorboard` the event files,
        in tensorboard/
    total_steps: where the run will end
    resumed_at: the step whose checkpoint the run goes on from. What an attempt that died wrote about later steps is
        dropped, so that no step appears twice; 0, a fresh run, drops everything
    wandb, settings: the project of Weights & Biases that the figures also go to, if any, and what it keeps with them
    quiet: show nothing

    seconds: since the start of the run, earlier attempts included
    tokens_per_second: running mean over about 20 steps; the first step, which warms up, counts only until the second

    Raises HandgradError if the folder cannot be written or an existing log is damaged before its last line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RunLog(folder, total_steps=2, quiet=True) as log:
    ...         log.step(1, loss=4.2, lr=1e-3, grad_norm=float("nan"), tokens=768, step_seconds=0.01)
    ...         log.event(2, "skipped: non-finite gradient")
    ...     first, second = read_log(folder + "/log.jsonl")
    >>> first["loss"], first["grad_norm"], second
    (4.2, None, {'step': 2, 'event': 'skipped: non-finite gradient'})
    """

    def __init__(
        self,
        out_dir: str | Path,
        total_steps: int,
        *,
        resumed_at: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        settings: dict[str, Any] | None = None,
        quiet: bool = False,
    ):
        self.path = Path(out_dir) / "log.jsonl"
        self.total_steps = total_steps
        self.tokens_per_second = 0.0
        self._trackers: list[TensorBoard | Wandb] = []
        if tensorboard:
            self._trackers.append(TensorBoard(Path(out_dir) / "tensorboard", resumed_at))
        if wandb:
            self._trackers.append(Wandb(wandb, Path(out_dir), settings or {}))
        earlier = _drop_after(self.path, resumed_at) if resumed_at else []
        self._before = max((line["seconds"] for line in earlier if line.get("seconds")), default=0.0)
        vals = [line["val_loss"] for line in earlier if line.get("val_loss")]
        self._val_loss = vals[-1] if vals else None
        try:  # unbuffered: a line is one write, and kill -9 loses none
            self._file = self.path.open("ab" if resumed_at else "wb", buffering=0)
            self._main = self.path.with_name("main.log").open("wb", buffering=0)
            self._main.write("".join(map(main_log, earlier)).encode())
        except OSError as error:
            raise HandgradError("log", f"{self.path} must be writable", error.strerror) from None
        self._console = None if quiet else Console()
        self._is_live = not quiet and sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._start = time.perf_counter()
        self._shown = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of this attempt's first report, for the ETA
        self._tokens = self._busy = 0.0  # tokens and seconds, both decayed alike: their ratio has no bias to correct

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        step_seconds: float,
        val_loss: float | None = None,
        mfu: float | None = None,
        hellaswag: float | None = None,
        gpu: dict[str, Any] | None = None,
    ) -> None:
        """Records one update.

        step: counted from 1
        loss, val_loss: nats a token; val_loss only where it was measured
        lr, grad_norm: learning rate; global gradient norm before clipping
        hellaswag: accuracy, 0 to 1, where it was measured
        gpu: what `Telemetry.read` returned, where it was asked
        mfu: model flops as a fraction of the hardware's peak, where that is known
        tokens, step_seconds: of this update alone, without validation, sampling and saving

        Raises HandgradError if the line cannot be written.
        """
        self._measure(tokens, step_seconds)
        now = self.seconds
        self._first = self._first or (step, now)
        line = {"step": step, "loss": float(loss)}
        if val_loss is not None:
            self._val_loss = line["val_loss"] = float(val_loss)
        line |= {} if hellaswag is None else {"hellaswag": float(hellaswag)}
        line |= {"lr": float(lr), "grad_norm": float(grad_norm)}
        line |= {"tokens_per_second": round(self.tokens_per_second, 1)}
        line |= {} if mfu is None else {"mfu": round(mfu, 4)}
        line |= {"seconds": round(now, 3)}
        line |= {"gpu": gpu} if gpu else {}
        self._write(line)
        for tracker in self._trackers:
            tracker.add(line)
        if self._console is not None:
            self._show(line, step_seconds, now)

    def event(self, step: int, text: str) -> None:
        """Records that something happened at a step, such as a skipped update, and shows it."""
        self._write({"step": step, "event": text})
        self.say(f"step {step}/{self.total_steps} | {text}")

    def say(self, text: str) -> None:
        """Shows text, above the live line if there is one. It does not enter the log."""
        if self._console is not None:
            self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Ends the live line and closes the files. Twice is harmless."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        while self._trackers:
            self._trackers.pop().close()
        self._file.close()
        self._main.close()

    def _write(self, line: dict) -> None:
        try:
            for file, data in ((self._file, _dump(line)), (self._main, main_log(line).encode())):
                written = file.write(data)
                if written < len(data):
                    file.write(data[written:])  # raises what stopped the first: most often a full disk
        except OSError as error:
            raise HandgradError("log", f"{self.path} must be writable", error.strerror) from None

    def _measure(self, tokens: int, step_seconds: float) -> None:
        if self._first is not None:  # the first step warms up caches and is left out of the mean
            self._tokens = tokens = RATE_DECAY * self._tokens + tokens
            self._busy = step_seconds = RATE_DECAY * self._busy + step_seconds
        self.tokens_per_second = tokens / max(step_seconds, 1e-9)

    def _show(self, line: dict, step_seconds: float, now: float) -> None:
        wait = LIVE_SECONDS if self._is_live else PLAIN_SECONDS
        is_due = now - self._shown >= wait or line["step"] >= self.total_steps
        if "val_loss" in line or "gpu" in line or (is_due and not self._is_live):
            text, overflow = plain_line(line, self.total_steps, step_seconds), "ellipsis" if self._is_live else "ignore"
            self._console.print(Text(text), no_wrap=True, overflow=overflow, crop=self._is_live)
        if is_due:
            self._shown = now
        if is_due and self._is_live:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)  # no thread: the kernels use every core
                self._live.start()
                self._console.show_cursor(True)  # a killed run must not leave the terminal without one
            self._live.update(self._live_line(line, now), refresh=True)

    def _live_line(self, line: dict, now: float) -> Table:
        step, (first, began) = line["step"], self._first
        shown = _parts(line if self._val_loss is None else line | {"val_loss": self._val_loss}, self.total_steps)
        if step >= self.total_steps:
            shown["time"] = clock(now) + " in all"
        elif step > first:
            shown["time"] = clock((self.total_steps - step) * (now - began) / (step - first)) + " left"
        shown.pop("gpu", None)  # has been printed
        for name in ("grad_norm", "lr"):  # of least use on a narrow screen
            if len("  ".join(shown.values())) >= self._console.width:
                del shown[name]
        room = min(self._console.width - LIVE_WIDTH, 30)  # not what this line leaves: the bar would change its length
        bar = [ProgressBar(self.total_steps, step, width=room)] if room >= 8 else []
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_row(*bar, Text("  ".join(shown.values()), no_wrap=True, overflow="ellipsis"))
        return table


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


def plain_line(line: dict, total_steps: int, step_seconds: float) -> str:
    """Returns a log line for people.

    >>> line = {"step": 1200, "loss": 3.412, "lr": 5.9e-4, "grad_norm": 0.4123, "tokens_per_second": 171_300.0}
    >>> plain_line(line | {"val_loss": 3.5}, 18865, 3.061)
    'step 1200/18865 | loss 3.4120 | val 3.5000 | grad 0.41 | lr 5.9e-4 | 171k tok/s | 3.06 s'
    """
    took = f"{step_seconds:.2f} s" if step_seconds >= 1 else f"{1e3 * step_seconds:.1f} ms"
    return " | ".join([*_parts(line, total_steps).values(), took])


def short(number: float) -> str:
    """Returns a count in three digits.

    >>> short(985), short(17_130), short(124_439_808), short(999_999_999)
    ('985', '17.1k', '124M', '1.00B')
    """
    if number < 999.5:
        return f"{number:.0f}"
    power = next((power for power in (3, 6, 9) if number < 999.5 * 10**power), 12)
    return f"{number / 10**power:#.3g}".rstrip(".") + "kMBT"[power // 3 - 1]


def clock(seconds: float) -> str:
    """Returns a span of time as hours, minutes and seconds.

    >>> clock(31.4), clock(3725)
    ('0:31', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that at any moment the old or the new content is there, whole. Raises HandgradError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name could be lost with the power
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise HandgradError("run", f"{path} must be writable", error.strerror) from None


def _parts(line: dict, total_steps: int) -> dict[str, str]:
    """The pieces of a line for people, in order, by key."""
    grad_norm = line["grad_norm"]
    parts = {"step": f"step {line['step']}/{total_steps}", "loss": f"loss {line['loss']:.4f}"}
    if "val_loss" in line:
        parts["val_loss"] = f"val {line['val_loss']:.4f}"
    if "hellaswag" in line:
        parts["hellaswag"] = f"hellaswag {100 * line['hellaswag']:.1f} %"
    parts["grad_norm"] = f"grad {grad_norm:.2f}" if 0.1 <= grad_norm < 1000 else f"grad {grad_norm:.2g}"
    parts["lr"] = f"lr {line['lr']:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    parts["tokens_per_second"] = f"{short(line['tokens_per_second'])} tok/s"
    if "mfu" in line:
        parts["mfu"] = f"mfu {100 * line['mfu']:.1f}"
    if "gpu" in line:
        parts["gpu"] = in_words(line["gpu"])
    return parts


def _dump(line: dict) -> bytes:
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


def _drop_after(path: Path, step: int) -> list[dict]:
    """Rewrites a log without the lines of later steps and without a torn end; returns the lines that stay."""
    lines = [line for line in read_log(path) if line["step"] <= step]
    replace_file(path, b"".join(map(_dump, lines)).decode())
    return lines
