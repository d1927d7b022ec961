"""What the recipes that write shards have in common: flags that say where and how, and a progress bar."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@dataclass(frozen=True)
class Shards:
    """Where to write, with which tokenizer, in how many processes."""

    out: str = ""
    """output folder; empty: plays for shakespeare, data for your own files, else the name of the data set"""
    tokenizer: str = "gpt2"
    """gpt2, chars (an id per character), a tokenizer.json, BERT's vocab.txt, a folder with one, or
    a model: a run, a .gguf, hf:NAME"""
    special_tokens: bool = False
    """a special token spelled out in the text, such as <|endoftext|>, is that token; else it is plain text"""
    shard_tokens: int = 100_000_000
    """tokens in a full shard"""
    workers: int = 0
    """processes that tokenize; 0: one per core, fewer for a small source"""
    replace: bool = False
    """replace shards of another source or tokenizer in the folder"""


class bar:
    """A progress bar on standard error while the block runs, if standard error is a terminal.

    kept: what is said of the folder when the user stops it
    """

    def __init__(self, kept: str = "finished shards are kept; the same command continues after them"):
        self.kept = kept

    def __enter__(self) -> Callable[[int, int, int], None]:
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]:,} tokens")
        console = Console(stderr=True)
        self.live = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.live.start()
        task = self.live.add_task("", tokens=0)
        return lambda read, size, tokens: self.live.update(task, completed=read, total=size, tokens=tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if kind is KeyboardInterrupt:
            print(self.kept, file=sys.stderr)
