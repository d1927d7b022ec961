"""Interrupt: Ctrl-C or SIGTERM lets the step end and a checkpoint be written; a second one ends the process."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

EXIT_CODE = 130  # as shells give for Ctrl-C


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into `requested`, which the loop reads between steps. The second ends the
    process.

    A step may be one long call into C, and Python runs its signal handlers only after that. A thread hears of the
    signal at once, through a pipe.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None]):
        self.requested, self._say = False, say

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):  # none once the other end is closed
            if number[0] not in self.SIGNALS:
                continue
            if self.requested:
                os._exit(EXIT_CODE)
            self.requested = True
            self._say("stopping after this step; once more to stop at once, without saving")
