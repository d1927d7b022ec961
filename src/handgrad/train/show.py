"""What a run prints before its first step: what it trains, on what, for how long, where; and what was set."""

from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from handgrad.data import Data, Mixture
from handgrad.train.config import PACKAGED, Config, RanksConfig
from handgrad.train.datasets import chats_in, is_all_chat
from handgrad.train.folder import flat
from handgrad.train.resolve import Run

RANKS = tuple(f.name for f in fields(RanksConfig))  # settings of a command, not of a run
PLACES = ("out", "resume", "config", "verbose", *RANKS)  # settings that the other lines tell
TILE = 16  # rows of a matrix that tensor cores and vector units take at once
MOST = 8  # ranks whose processes are named


def show(run: Run, given: Config, processes: list[int]) -> None:
    """Prints five facts and the settings that differ from the defaults; all of them with --verbose.

    given: the settings before they were resolved;  processes: of the ranks, by which mpiexec names one
    """
    console = Console(highlight=False, markup=False, emoji=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in facts(run):
        table.add_row(f" {name}", text)
    if len(processes) > 1:
        named = ", ".join(f"{rank} is process {number}" for rank, number in enumerate(processes[:MOST]))
        named += f", and {len(processes) - MOST} more" if len(processes) > MOST else ""
        table.add_row(" ranks", f"{named}; zero {run.config.compute.zero}")
    changed = differences(given)
    every = flat(asdict(run.config))
    if run.config.log.verbose:
        table.add_row(" settings", as_flags(every))
    else:
        rest = "all others are the defaults" if changed else "the defaults"
        table.add_row(" settings", "; ".join(filter(None, [as_flags(changed), f"{rest}, which --verbose lists"])))
    console.print(table)
    steps, packings = run.steps, [one.packing for one in chats_in(run.trainer.data) if one.packing]
    if any(packing.method == "none" and packing.filled < 0.5 for packing in packings):
        hint = f"--packing best_fit puts several rows into one{shorter_windows(run.trainer.data)}"
        console.print(f" padding takes more of the chats' windows than their rows do: {hint}", soft_wrap=True)
    if run.config.data.train == f"./{PACKAGED}":
        console.print(f" trains on the folder {PACKAGED} here, not on the text in the package", soft_wrap=True)
    if run.done == steps:
        hint = "raise --steps to continue" + ", with --extend from before the cooldown" * bool(run.branch)
        console.print(f" nothing left to do: {hint}", soft_wrap=True)
    elif (run.config.optim.warmup or 0) >= steps:
        console.print(f" all {steps} steps are warm-up; a smaller --warmup lets the rate decay", soft_wrap=True)
    console.print()


def shorter_windows(d: Data) -> str:
    """The flags of the shortest windows that hold every padded row, and as many of them in a step."""
    if isinstance(d, Mixture) or d.packing is None:
        return ""
    size = -(-max(d.packing.longest - 1, 1) // TILE) * TILE
    flags = f"--seq-len {size} --batch-tokens {size * d.sequences}"
    return f"; {flags} pads every row to the longest" * (size < d.seq_len)


def facts(run: Run) -> list[tuple[str, str]]:
    """The model, the data, the length of the run, the hardware, the folder: (name, text)."""
    m, d, c = run.config.model, run.trainer.data, run.config
    sizes = f"{m.num_layers} layers, {m.num_heads} heads, width {m.hidden_size}"
    padding = run.trainer.program.num_padding
    padded = f" ({padding:,} more pad the vocabulary)" if padding else ""
    count = run.facts["trainable"]
    trainable = f"; {count:,} learn" if count < run.facts["params"] else ""
    steps, tokens = run.steps, run.steps * d.batch_tokens
    new_rows = [("new rows", run.facts["new_rows"])] if "new_rows" in run.facts else []
    accumulated = f"{run.trainer.accumulation} x " if run.trainer.accumulation > 1 else ""
    length = f"{steps:,} steps of {d.batch_tokens:,} tokens ({accumulated}{c.compute.micro_batch} x {d.seq_len})"
    mixed = [("mixture", d.about())] if isinstance(d, Mixture) else []  # with the epochs of each set
    length += "" if mixed else f": {tokens / (d.windows * d.seq_len):.2f} epochs"
    return [
        ("model", f"{m.family}, {sizes}: {run.facts['params']:,} parameters{padded}{trainable}"),
        *new_rows,
        *groups(run),
        ("data", f"{c.data.train}: {sum(s.count for s in d.shards):,} tokens, vocab-size {run.tokenizer.vocab_size:,}"),
        *mixed,
        *chats(d),
        ("length", length),
        ("hardware", f"{run.facts['hardware']}; {run.facts['dtype']}, {run.facts['arena']} of memory"),
        ("folder", f"{run.out}, resumed at step {run.done}" if run.done else f"{run.out}"),
    ]


def chats(d: Data) -> list[tuple[str, str]]:
    """A line for each set of chats: how its rows fill the windows, what is cut, and what losses are of."""
    found, texts = chats_in(d), "" if is_all_chat(d) else ", and of all tokens of texts"
    lines = [f"{one.packing}{f', of {one.pattern}' * (len(found) > 1)}" for one in found]
    if lines:
        lines[-1] += f"; losses are of the assistant's tokens{texts}"
    return [("" if number else "chat", line) for number, line in enumerate(lines)]


def groups(run: Run) -> list[tuple[str, str]]:
    """A line for each of the optimizer's groups that it has a rule for: how many parameters, and their rule."""
    lines: list[tuple[str, str]] = []
    for group, rule in run.trainer.optim.groups.rules.items():
        tensors = [p.tensor for b in run.trainer.program.buckets if b.group == group for p in b.members]
        size = f"{sum(t.size for t in tensors):,} parameters in {len(tensors)} tensors"
        if tensors:
            lines.append(("" if lines else "optimizer", f"{group}: {size}; {rule}"))
    return lines


def differences(given: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, by name."""
    defaults = flat(asdict(Config()))
    values = flat(asdict(given))
    return {name: v for name, v in values.items() if v != defaults[name] and name not in PLACES}


def as_flags(settings: dict[str, Any]) -> str:
    """Settings as a line: names as flags spell them, and values.

    >>> as_flags({"lr": 0.001, "prompt": "a b", "shuffle": False})
    "lr 0.001, prompt 'a b', no-shuffle"
    """
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"no-{flag}")
        else:
            is_plain = not isinstance(value, str) or (value.isprintable() and " " not in value and value)
            words.append(f"{flag} {value}" if is_plain else f"{flag} {value!r}")
    return ", ".join(words)
