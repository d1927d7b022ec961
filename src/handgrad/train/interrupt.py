"""Signals: Ctrl-C, SIGTERM or SIGHUP lets the step end and a checkpoint be written; a second one ends the process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 130  # as shells give for Ctrl-C


class Interrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into `requested`, which the loop reads between steps. The second ends
    the process.

    A step may be one long call into C, and Python runs its signal handlers only after that. A thread hears of the
    signal at once, through a pipe. It leaves the saying to another thread: a terminal that is held (Ctrl-S) would keep
    it from hearing the second signal.

    last: called before the second signal ends the process
    """

    def __init__(self, say: Callable[[str], None], last: Callable[[], None] = lambda: None):
        self.requested, self._say, self._last = False, say, last

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, *ending())}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._saying: threading.Thread | None = None
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)
        if self._saying is not None:
            self._saying.join(timeout=1)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):  # none once the other end is closed
            if number[0] not in self._handlers:
                continue
            if self.requested and number[0] != signal.SIGHUP:  # a closing terminal and its shell each send one
                self._last()
                os._exit(EXIT_CODE)
            if self.requested:
                continue
            self.requested = True
            text = "stopping after this step; once more to stop at once, without saving"
            self._saying = threading.Thread(target=self._say, args=(text,), daemon=True)
            self._saying.start()


def ending() -> list[signal.Signals]:
    """The signals that ask a process to end. SIGHUP is one unless it is ignored, as under nohup."""
    return [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """While the block runs, the first signal that asks to end raises KeyboardInterrupt, as Ctrl-C does, so that the
    block can clean up; while it does, more of them are ignored.
    """

    def end(*_: Any) -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, end) for number in ending()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
