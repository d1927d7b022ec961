"""Ranks that are threads of the test's process."""

import threading

import numpy as np

from handgrad.backends.ranks.comm import Alone, Comm, RankError


class Shared:
    """What the threads of one group share: sent[r][s] is what rank r sends to rank s."""

    def __init__(self, world):
        self.barrier, self.sent = threading.Barrier(world), [[np.empty(0, np.uint8)] * world for _ in range(world)]
        self.error = None


class Threads(Comm):
    """A rank that is a thread of this process."""

    def __init__(self, rank, world, shared):
        self.rank, self.world, self._shared = rank, world, shared
        self.local_world, self.local_rank = world, rank

    def all_to_all(self, send, receive):
        shared = self._shared
        shared.sent[self.rank] = list(send)
        try:
            shared.barrier.wait()
            for r in range(self.world):
                if r != self.rank:
                    receive[r][...] = shared.sent[r][self.rank]
            shared.barrier.wait()
        except threading.BrokenBarrierError:
            raise shared.error or RankError(-1, "its thread has ended") from None

    def fail(self, text, code=2):
        self._shared.error = RankError(self.rank, text, code)
        self._shared.barrier.abort()

    def after_failure(self):
        return Alone()


def open_threads(world):
    """The ranks of one group: a `Threads` for each, or `Alone`."""
    if world == 1:
        return [Alone()]
    shared = Shared(world)
    return [Threads(rank, world, shared) for rank in range(world)]


def on_ranks(world, work):
    """What work(comm) returns on each rank, all of them threads. The error of a rank is raised here."""
    results, errors = [None] * world, []

    def run(comm):
        try:
            results[comm.rank] = work(comm)
        except BaseException as error:
            errors.append(error)
            comm.fail(str(error))

    threads = [threading.Thread(target=run, args=(c,)) for c in open_threads(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, RankError)), errors[0])
    return results
