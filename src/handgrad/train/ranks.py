"""What differs between the ranks of a run: rank 0 writes files, shows the run and prints errors; the others do not."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

from handgrad.backends.ranks.comm import Comm, RankError
from handgrad.core.errors import HandgradError
from handgrad.train.config import Config, RanksConfig
from handgrad.train.folder import flat
from handgrad.train.interrupt import EXIT_CODE

T = TypeVar("T")


class NullLog:
    """The log of the ranks that write none: all but rank 0."""

    is_deleted = False

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def step(self, step: int, **figures: Any) -> None:
        pass

    def event(self, step: int, text: str, **figures: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def activity(self, text: str) -> Any:
        return nullcontext()

    def flush(self) -> None:
        pass

    def restore(self) -> None:
        pass


def on_rank_0(comm: Comm, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which JSON can hold. The others wait for it, because it may write files."""
    return comm.all_gather_object(work() if comm.rank == 0 else None)[0]


def check_same(comm: Comm, c: Config) -> None:
    """Raises HandgradError on all ranks if one was started with other settings than rank 0."""
    own = flat(asdict(replace(c, ranks=RanksConfig())))
    settings = comm.all_gather_object(list(own.items()))
    for rank, others in enumerate(settings):
        for (name, value), (_, other) in zip(settings[0], others):
            if value != other:
                rule = f"all ranks have the settings of rank 0: --{name.replace('_', '-')} {value}"
                raise HandgradError("ranks", rule, f"{other} on rank {rank}")


@contextmanager
def together(comm: Comm) -> Iterator[None]:
    """An error that ends the block on one rank ends it on all, with one exit code. Rank 0 prints it; if it is rank 0
    that is gone, rank 1 does.

    Raises SystemExit with the code where there are several ranks. Any other exception than HandgradError is a bug: the
    rank where it occurred prints its traceback.
    """
    try:
        yield
    except BaseException as error:
        if comm.world == 1 or isinstance(error, SystemExit):  # --help
            raise
        code = exit_code(error)
        comm.fail(str(error) if isinstance(error, HandgradError) else repr(error), code)
        if not isinstance(error, HandgradError | KeyboardInterrupt):
            traceback.print_exception(error)
        elif comm.rank == printing_rank(error) and isinstance(error, HandgradError):
            print(error, *getattr(error, "__notes__", ()), file=sys.stderr)
        sys.stderr.flush()
        if not (isinstance(error, RankError) and error.is_gone):
            with suppress(HandgradError):  # a rank that does not answer
                comm.after_failure().all_gather_bytes()  # mpiexec ends all once one has: not before all have printed
        if comm.is_stuck():  # Python's cleanup would wait for the device
            sys.stdout.flush()
            comm.is_stuck = lambda: False  # type: ignore[method-assign]  # handled here: atexit must not exit again
            atexit._run_exitfuncs()  # which end the ranks that this one has started
            os._exit(code)
        if isinstance(error, KeyboardInterrupt) and comm.rank == 0:
            raise
        raise SystemExit(code) from None


def printing_rank(error: BaseException) -> int:
    """The rank that prints an error."""
    return 1 if isinstance(error, RankError) and error.is_gone and error.rank == 0 else 0


def exit_code(error: BaseException) -> int:
    """The exit code with which an error ends a process."""
    if isinstance(error, RankError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_CODE
    return 2 if isinstance(error, HandgradError) else 1
