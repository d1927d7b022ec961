"""Jobs on several processes, their results in the order of the jobs."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from handgrad.core.errors import HandgradError
from handgrad.data.shards import id_dtype

BATCH_CHARACTERS = 2**18  # tokenized at a time, so that memory does not depend on a job's size
_AHEAD = 3  # jobs under way for each process
_tokenizer = None  # of a worker process


@dataclass(frozen=True)
class Job:
    """A call that yields texts: `read(*arguments)`. Small, for it travels to another process.

    continues: the first text goes on with the document of the job before
    """

    read: Callable[..., Iterable[str]]
    arguments: tuple
    continues: bool = False


def tokenize(jobs: Iterable[tuple[Any, Job]], tokenizer, workers: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields (key, ids) for each (key, job), in order, ids in the shard type of the tokenizer's vocabulary.

    workers: processes; with 1, this one. They end with this process, however it ends.

    Raises HandgradError where a job does, and if a process dies.
    """
    if workers == 1:
        for key, job in jobs:
            yield key, _ids(job, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # threads of numpy and of the terminal do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _start, (tokenizer,))
    waiting = deque()
    try:
        for key, job in jobs:
            waiting.append((key, pool.submit(_work, job)))
            if len(waiting) > _AHEAD * workers:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)
    except BrokenProcessPool:
        hint = "was it killed for want of memory? fewer --workers take less"
        raise HandgradError("data", "worker processes must stay alive", "one that died", hint=hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _result(waiting: deque) -> tuple[Any, np.ndarray]:
    key, future = waiting.popleft()
    found = future.result()
    if isinstance(found, tuple):
        where, rule, got, hint = found
        raise HandgradError(where, rule, got, hint=hint)
    return key, found


def _ids(job: Job, tokenizer) -> np.ndarray:
    parts, batch, size = [], [], 0
    for text in job.read(*job.arguments):
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            parts.append(tokenizer.encode_documents(batch))
            batch, size = [], 0
    parts.append(tokenizer.encode_documents(batch))
    ids = np.concatenate([part.astype(id_dtype(tokenizer.vocab_size)) for part in parts])
    return ids[1:] if job.continues and tokenizer.eot is not None else ids


def _start(tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(job: Job) -> np.ndarray | tuple:
    try:
        return _ids(job, _tokenizer)
    except HandgradError as error:  # told in parts: an exception with four arguments does not travel
        return error.where, error.rule, error.got and str(error.got), error.hint
