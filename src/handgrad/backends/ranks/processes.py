"""processes: the ranks that a command starts on its own machine, as processes that it watches and ends."""

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

RANK_VARIABLE = "HANDGRAD_RANK"  # tells a started process its rank, world, port of rank 0, parent process and run
EXIT_SECONDS = 5.0  # the other ranks have to end after rank 0


class RankProcesses:
    """Ranks 1 to world - 1 as processes, each of which repeats the command. They end with this process.

    port: at which rank 0 listens
    """

    def __init__(self, world: int, port: int, run: str, argv: Sequence[str]):
        self._processes: dict[int, subprocess.Popen] = {}
        for rank in range(1, world):
            env = os.environ | {RANK_VARIABLE: f"{rank} {world} {port} {os.getpid()} {run}"}
            command = [sys.executable, "-P", "-m", "handgrad.cli", *argv]
            self._processes[rank] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)
        atexit.register(self.end)

    def exit_reason(self, rank: int, seconds: float = 1.0) -> str:
        """How the process of a rank has ended, if it does within so many seconds; else ""."""
        try:
            code = self._processes[rank].wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return ""
        return (
            f"its process was ended by signal {-code}" if code < 0 else f"its process has ended with exit code {code}"
        )

    def first_exit(self) -> str:
        """The first rank whose process has ended, and how; "" while all run."""
        reasons = ((rank, self.exit_reason(rank, 0.0)) for rank in self._processes)
        return next((f"rank {rank}: {reason}" for rank, reason in reasons if reason), "")

    def kill(self) -> None:
        """Kills all of them."""
        for process in self._processes.values():
            process.kill()

    def end(self) -> None:
        """Waits for all of them, and kills those that hang or are stopped."""
        deadline = time.monotonic() + EXIT_SECONDS
        for process in self._processes.values():
            if process.poll() is None and process_stat(process.pid)[0] == "T":
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(deadline - time.monotonic(), 0.0))
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, the state: "T" is a stopped process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
