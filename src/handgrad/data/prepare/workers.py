"""Runs jobs on worker processes and yields their token ids in the order of the jobs."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.json_lines import repaired
from handgrad.data.shards import id_dtype

_AHEAD = 3  # jobs in flight per process
_SAFE = "PYTHONSAFEPATH"
FEWER = "use fewer workers"


class Encoder(Protocol):
    """What a data set needs of a tokenizer: `handgrad.tokenizers.Tokenizer`, as far as it is used here."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int | None: ...

    @property
    def begins(self) -> tuple[int, ...]: ...

    @property
    def specials(self) -> tuple[str, ...]: ...

    def encode(self, text: str, special: bool = False) -> np.ndarray: ...

    def bytes_of(self, id: int) -> bytes: ...

    def save(self, folder: Path) -> dict: ...


@dataclass(frozen=True)
class Damage:
    """What a reader did not yield as it is in the source.

    skipped: rows without text, or lines that are no UTF-8, which were left out
    replaced: bytes that are no UTF-8, and lone surrogates, now U+FFFD
    """

    skipped: int = 0
    replaced: int = 0

    def __add__(self, other: "Damage") -> "Damage":
        return Damage(self.skipped + other.skipped, self.replaced + other.replaced)


@dataclass(frozen=True)
class Job:
    """A call that yields documents, ids that are tokens already, and the damage of either: `read(*arguments)`.

    A document is text, or for `read_chats` a chat.

    Both are pickled and sent to a worker process: keep them small.

    continues: the first text continues the last document of the previous job, so no end-of-text id precedes it
    """

    read: Callable[..., Iterable[Any]]
    arguments: tuple
    continues: bool = False


_Told = tuple[str, str, str | None, str]  # where, rule, got, hint: a HandgradError does not pickle


@dataclass(frozen=True)
class Ids:
    """ids: of a job, (n,) in the shard dtype of the vocabulary;  damage: of its documents"""

    ids: np.ndarray
    damage: Damage


def tokenize(
    jobs: Iterable[tuple[Any, Job]], tokenizer: Encoder, workers: int, special: bool = False
) -> Iterator[tuple[Any, Ids]]:
    """Yields (key, ids) for each (key, job), in order.

    An end-of-text id precedes every document, as in llm.c's shards, if the tokenizer has one; then what the tokenizer
    puts before every text, if that is another.

    special: special tokens spelled out in a document are tokens, not text
    workers: processes; 1 runs the jobs in this process. Workers exit when this process does, even if it is killed.

    Raises HandgradError if a job does, or if a worker dies.
    """
    if workers == 1:
        for key, job in jobs:
            yield key, _ids(job, tokenizer, special)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe: numpy and rich have threads
    with _folder_last():
        pool = ProcessPoolExecutor(workers, context, _start, (tokenizer, special))
    waiting: deque[tuple[Any, Future[Ids | _Told]]] = deque()
    try:
        for key, job in jobs:
            with _folder_last():  # a submission may start a process
                waiting.append((key, pool.submit(_work, job)))
            if len(waiting) > _AHEAD * workers:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)
    except BrokenProcessPool:
        rule = "worker processes must stay alive"
        raise HandgradError("data", rule, "one that died", hint=f"if it ran out of memory, {FEWER}") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _folder_last() -> Iterator[None]:
    """Processes started in the block look for modules in the current folder last: a random.py in it is not Python's.

    Python puts the folder first for its own start (`-c`), and copies this process's path, where `python -m` put it.
    """
    here, saved, path = os.getcwd(), os.environ.get(_SAFE), list(sys.path)
    if here != str(Path(__file__).parents[3]):  # where this package lies is not a folder of strangers
        sys.path.sort(key=lambda entry: os.path.abspath(entry) == here)
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        sys.path[:] = path
        os.environ.pop(_SAFE)
        if saved is not None:
            os.environ[_SAFE] = saved


def _result(waiting: deque[tuple[Any, Future[Ids | _Told]]]) -> tuple[Any, Ids]:
    key, future = waiting.popleft()
    found = future.result()
    if isinstance(found, tuple):
        where, rule, got, hint = found
        raise HandgradError(where, rule, got, hint=hint)
    return key, found


def _ids(job: Job, tokenizer: Encoder, special: bool) -> Ids:
    dtype, begins = id_dtype(tokenizer.vocab_size), tokenizer.begins
    ends = () if tokenizer.eot is None or tokenizer.eot in begins else (tokenizer.eot,)
    separator = np.array([*ends, *begins], dtype)
    parts, damage = [separator[:0]], Damage()
    try:
        for found in job.read(*job.arguments):
            if isinstance(found, Damage):
                damage += found
            elif isinstance(found, np.ndarray):
                parts.append(found.astype(dtype))
            else:
                whole, count = repaired(found)
                damage += Damage(replaced=count)
                parts += [separator, tokenizer.encode(whole, special).astype(dtype)]
        ids = np.concatenate(parts)
    except MemoryError:
        raise HandgradError("data", "tokenizing ran out of memory", hint=FEWER) from None
    return Ids(ids[len(separator) :] if job.continues else ids, damage)


_tokenizer: Encoder  # of a worker process
_special: bool


def _start(tokenizer: Encoder, special: bool) -> None:
    global _tokenizer, _special
    _tokenizer, _special = tokenizer, special
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in workers only
    wait([parent.sentinel])
    os._exit(1)


def _work(job: Job) -> Ids | _Told:
    try:
        return _ids(job, _tokenizer, _special)
    except HandgradError as error:
        return error.where, error.rule, None if error.got is None else str(error.got), error.hint
