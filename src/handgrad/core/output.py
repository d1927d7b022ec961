"""Standard streams that can go away: the reader of a pipe leaves, a terminal closes, the disk behind a file is full."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Output:
    """A text stream. The first text that cannot be written ends it: `lost` hears why, once, and all later text is gone.

    lost: may raise, to end what is being written; if it returns, the writer never learns that nobody reads
    """

    def __init__(self, stream: "TextIO | Output", lost: Callable[[OSError], None] = lambda error: None):
        self._stream: TextIO = stream._stream if isinstance(stream, Output) else stream
        self._lost, self._is_lost = lost, False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def end(self) -> None:
        """Flushes for the last time; the interpreter, which flushes again when it ends, then finds nothing to fail."""
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, do: Callable[..., Any], *args: str) -> None:
        if self._is_lost:
            return
        try:
            do(*args)
        except BlockingIOError:  # a reader that is slow has not left: it misses this text
            pass
        except OSError as error:
            self._is_lost = True
            discard(self._stream)
            self._lost(error)


@contextmanager
def redirected(stdout: Output, stderr: Output) -> Iterator[None]:
    """While the block runs, what is printed goes to these."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, stdout), cast(TextIO, stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def discard(stream: TextIO) -> None:
    """Leads a stream's descriptor nowhere. What the stream still holds would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def open_missing() -> None:
    """Opens the standard streams that were closed before the process started: reading ends at once, writing fails.

    Otherwise the next file that is opened, such as a log, gets the number of a stream, and what is printed goes there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest number that is free, which is this one
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))
