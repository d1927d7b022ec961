"""Ranks that are threads of the test's process."""

import threading

from handgrad.backends.ranks.comm import Alone, RankError, open_threads


def on_ranks(world, work):
    """What work(comm) returns on each rank, all of them threads. The error of a rank is raised here."""
    results, errors = [None] * world, []

    def run(comm):
        try:
            results[comm.rank] = work(comm)
        except BaseException as error:
            errors.append(error)
            comm.fail(str(error))

    threads = [threading.Thread(target=run, args=(c,)) for c in (open_threads(world) if world > 1 else [Alone()])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, RankError)), errors[0])
    return results
