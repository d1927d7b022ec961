"""The log of a run: a JSON object a step in log.jsonl, llm.c's lines in main.log, a live line on a terminal."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handgrad.core.disk import append, flush, write_whole
from handgrad.core.errors import HandgradError, one_line
from handgrad.train.log_file import abbreviated, drop_after, dump, main_log
from handgrad.train.log_text import clock, fitted, parts, plain_line
from handgrad.train.trackers import TensorBoard, Wandb

PLAIN_SECONDS = 5.0  # between lines where nobody watches live
LIVE_WIDTH = 92  # columns that the live line takes in a long run, without its bar
LIVE_SECONDS = 0.1  # between redraws of the live line: one takes 0.4 ms from the kernels
VAL = "val_loss", "val_acc"  # what a validation measures
RATE_DECAY = 0.95  # of the running mean of tokens per second, per step


class RunLog:
    """Writes and shows what a run does, step by step. A context manager; `close` ends the live line.

    out_dir: the run folder; log.jsonl and main.log (see `main_log`) lie there, and with `tensorboard` the event files,
        in tensorboard/
    total_steps: where the run will end
    resumed_at: the step whose checkpoint the run resumes from. What an attempt that died wrote about later steps is
        dropped, so that no step appears twice; 0, a fresh run, drops everything. An event names the rows that were no
        lines and are now in log.jsonl.bad, and the steps that the log lacks
    wandb, settings: the project of Weights & Biases that the figures also go to, if any, and what it keeps with them.
        A tracker, either of the two, that fails later is dropped, and an event says so
    quiet: show nothing

    seconds: since the start of the run, earlier attempts included
    tokens_per_second: running mean over about 20 steps; the first step, which warms up, counts only until the second

    Raises HandgradError if the folder cannot be written.

    >>> import tempfile
    >>> from handgrad.train.log_file import read_log
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
        self._files = threading.Lock()  # a checkpoint's thread flushes them
        self._trackers: list[TensorBoard | Wandb] = []
        if tensorboard:
            self._trackers.append(TensorBoard(Path(out_dir) / "tensorboard", resumed_at))
        if wandb:
            self._trackers.append(Wandb(wandb, Path(out_dir), settings or {}))
        earlier, bad = drop_after(self.path, resumed_at) if resumed_at else ([], [])
        seconds = (line["seconds"] for line in earlier if line.get("seconds"))
        self._before = max(filter(math.isfinite, seconds), default=0.0)
        vals = [line for line in earlier if line.get("val_loss")]
        self._val = {key: vals[-1][key] for key in VAL if vals and vals[-1].get(key) is not None}
        try:
            if resumed_at:
                write_whole(self.path.with_name("main.log"), [main_log(line).encode() for line in earlier])
            self._open("ab" if resumed_at else "wb")
        except OSError as error:
            raise HandgradError("log", f"{self.path} must be writable", error.strerror) from None
        self._console = Console(quiet=quiet)
        self._is_live = not quiet and sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._last: dict | None = None  # the newest line
        self._start = time.perf_counter()
        self._shown = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of this attempt's first report, for the ETA
        self._tokens = self._busy = 0.0  # tokens and seconds, both decayed alike: their ratio has no bias to correct
        for text in lacks(earlier, bad, resumed_at):
            self.event(resumed_at, text)

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
        val_acc: float | None = None,
        mfu: float | None = None,
        hellaswag: float | None = None,
        exposed: float | None = None,
        gpu: dict[str, Any] | None = None,
    ) -> None:
        """Records one update.

        step: counted from 1
        loss, val_loss: nats a token; val_loss only where it was measured
        val_acc: accuracy of a classifier, 0 to 1, where it was measured
        lr, grad_norm: learning rate; global gradient norm before clipping
        hellaswag: accuracy, 0 to 1, where it was measured
        exposed: seconds that computation waited for other ranks, where there are several
        gpu: what `Telemetry.read` returned, where it was read
        mfu: model flops as a fraction of the hardware's peak, where that is known
        tokens, step_seconds: of this update alone, without validation, sampling and saving

        Raises HandgradError if the line cannot be written.
        """
        self._measure(tokens, step_seconds)
        now = self.seconds
        self._first = self._first or (step, now)
        line: dict[str, Any] = {"step": step, "loss": float(loss)}
        if val_loss is not None:
            self._val = _validated(val_loss, val_acc)
            line |= self._val
        line |= {} if hellaswag is None else {"hellaswag": float(hellaswag)}
        line |= {"lr": float(lr), "grad_norm": float(grad_norm)}
        line |= {"tokens_per_second": round(self.tokens_per_second, 1)}
        line |= {} if mfu is None else {"mfu": round(mfu, 4)}
        line |= {} if exposed is None else {"exposed_ms": round(1e3 * exposed, 3)}
        line |= {"seconds": round(now, 3)}
        line |= {"gpu": gpu} if gpu else {}
        self._write(line)
        self._track(line)
        if not self._console.quiet:
            self._show(line, step_seconds, now)

    def validation(self, step: int, val_loss: float, val_acc: float | None = None) -> None:
        """Records a validation, as `step` does, that was measured after the line of a step was written."""
        self._val = _validated(val_loss, val_acc)
        self._write({"step": step, **self._val})

    def event(self, step: int, text: str, **figures: Any) -> None:
        """Records that something happened at a step, such as a skipped update, and shows it.

        figures: what it set, such as the learning rate from here on, or the sets of a mixture (`Mixture.progress`)
        """
        self._write({"step": step, "event": text, **figures})
        self.say(f"step {step}/{self.total_steps} | {text}")

    def say(self, text: str) -> None:
        """Shows text, above the live line if there is one. It does not enter the log."""
        self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def activity(self, text: str) -> Iterator[None]:
        """Shows on the live line what happens between two steps, such as "validating", while the block runs."""
        self._refresh(text)
        try:
            yield
        finally:
            self._refresh()

    def flush(self) -> None:
        """Returns once every line is on disk and survives a power failure. Raises the OSError that prevents it."""
        with self._files:
            for file in (self._file, self._main):
                if not file.closed:
                    os.fsync(file.fileno())
            flush(self.path.parent)

    @property
    def is_deleted(self) -> bool:
        """Whether the log has no name any more: what is written to it would be lost."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def restore(self) -> None:
        """Writes the log, as far as it has come, under its name again, where a new run folder lies there.

        Raises HandgradError if that fails.
        """
        try:
            with self._files:
                for file in (self._file, self._main):
                    with open(f"/proc/self/fd/{file.fileno()}", "rb") as old:  # still has its content
                        write_whole(file.name, [old.read()])
                    file.close()
                self._open("ab")
        except OSError as error:
            raise HandgradError("log", f"{self.path} must be writable", error.strerror) from None

    def close(self) -> None:
        """Ends the live line and closes the files. Twice is harmless."""
        if self._live is not None and self._last is not None:
            self._live.update(self._live_line(self._last, self.seconds, is_over=True))
            self._live.stop()  # which draws it
            self._live = None
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.close()
            except Exception as error:
                self.say(f"{tracker.NAME} failed at the end: {one_line(error)}")
        with self._files:
            self._file.close()
            self._main.close()

    def _open(self, mode: str) -> None:
        """Unbuffered, so that kill -9 loses no line."""
        self._file = FileIO(self.path, mode)
        self._main = FileIO(self.path.with_name("main.log"), mode)

    def _write(self, line: dict) -> None:
        try:
            append(self._file, dump(line))
            append(self._main, main_log(line).encode())
        except OSError as error:
            raise HandgradError("log", f"{self.path} must be writable", error.strerror) from None

    def _track(self, line: dict) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.add(line)
            except Exception as error:  # whatever it is: figures elsewhere are not worth a run
                self._trackers.remove(tracker)
                with suppress(Exception):
                    tracker.close()
                self.event(line["step"], f"{tracker.NAME} gets no more figures: {one_line(error)}")

    def _measure(self, tokens: float, step_seconds: float) -> None:
        if self._first is not None:  # the first step warms up caches and is left out of the mean
            self._tokens = tokens = RATE_DECAY * self._tokens + tokens
            self._busy = step_seconds = RATE_DECAY * self._busy + step_seconds
        self.tokens_per_second = tokens / max(step_seconds, 1e-9)

    def _show(self, line: dict, step_seconds: float, now: float) -> None:
        wait = LIVE_SECONDS if self._is_live else PLAIN_SECONDS
        self._last = line
        is_due = now - self._shown >= wait or line["step"] >= self.total_steps
        if "val_loss" in line or "gpu" in line or (is_due and not self._is_live):
            width = self._console.width if self._is_live else math.inf
            self.say(plain_line(line, self.total_steps, step_seconds, width))
        if is_due:
            self._shown = now
        if is_due and self._is_live:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)  # no thread: the kernels use every core
                self._live.start()
                self._console.show_cursor(True)  # a killed run must not leave the terminal without one
            self._live.update(self._live_line(line, now), refresh=True)

    def _refresh(self, activity: str = "") -> None:
        if self._live is not None and self._last is not None:
            self._live.update(self._live_line(self._last, self.seconds, activity), refresh=True)

    def _live_line(self, line: dict, now: float, activity: str = "", is_over: bool = False) -> Table:
        assert self._first is not None  # `step` sets it before it shows a line
        step, (first, began) = line["step"], self._first
        shown = parts(line | self._val, self.total_steps)
        if is_over and "val_loss" in line:  # its figures have been printed
            shown = {"step": shown["step"]}
        if is_over or step >= self.total_steps:
            shown["time"] = clock(now) + " in all"
        elif step > first:
            shown["time"] = clock((self.total_steps - step) * (now - began) / (step - first)) + " left"
        shown.pop("gpu", None)  # has been printed
        if activity:
            shown["tokens_per_second"] = activity  # no step runs
        shown = fitted(shown, "  ", self._console.width - 1)
        room = min(self._console.width - LIVE_WIDTH, 30)  # not what this line leaves: the bar would change its length
        bar = [ProgressBar(self.total_steps, step, width=room)] if room >= 8 else []
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_row(*bar, Text("  ".join(shown.values()), no_wrap=True, overflow="ellipsis"))
        return table


def _validated(*found: float | None) -> dict[str, float]:
    """What a validation measured, by name."""
    return {key: float(value) for key, value in zip(VAL, found, strict=True) if value is not None}


def lacks(earlier: list[dict], bad: list[int], resumed_at: int) -> Iterator[str]:
    """What a log that is resumed lacks, as events that it does not hold yet.

    earlier: its lines;  bad: the numbers of rows that were none
    """
    if bad:
        yield f"{len(bad)} of the log's rows were damaged and are now in log.jsonl.bad: row {abbreviated(bad)}"
    last = max((line["step"] for line in earlier if "loss" in line), default=resumed_at)
    if last < resumed_at:
        text = f"the log lacks step {abbreviated(range(last + 1, resumed_at + 1))}"
        if not any(line.get("event") == text for line in earlier):
            yield text
