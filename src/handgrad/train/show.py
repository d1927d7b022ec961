"""What a run prints before its first step: the settings, and what they do not say."""

from dataclasses import asdict
from itertools import zip_longest

from rich.console import Console
from rich.table import Table

from handgrad.train.resolve import PACKAGED, Run


def show(run: Run) -> None:
    """Prints the settings, the longest group beside the others, and the facts."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for _ in range(7):
        table.add_column(overflow="fold")
    columns: list[list[tuple[str, str, str]]] = [[], []]
    for group, values in asdict(run.config).items():
        for i, (name, value) in enumerate(values.items()):
            text = repr(value) if isinstance(value, str) else str(value)
            columns[group == "run"].append(("" if i else group, name.replace("_", "-"), text))
    for left, right in zip_longest(*columns, fillvalue=("", "", "")):
        table.add_row(*left, "  ", *right)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    f, where, steps = run.facts, f"run folder {run.out}", run.config.run.steps
    console.print(f" {f['params']:,} parameters, {f['arena']} of memory, {f['hardware']}", soft_wrap=True)
    if run.config.data.train == f"./{PACKAGED}":
        console.print(f" trains on the folder {PACKAGED} here, not on the text in the package", soft_wrap=True)
    console.print(f" {where}, resumed at step {run.done}" if run.done else f" {where}", soft_wrap=True)
    if run.done == steps:
        console.print(" nothing left to do: raise --run.steps to continue", soft_wrap=True)
    elif run.config.optim.warmup >= steps:
        console.print(f" all {steps} steps are warm-up: --optim.warmup", soft_wrap=True)
    console.print()
