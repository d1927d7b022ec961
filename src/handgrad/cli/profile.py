"""handgrad profile MODEL: runs a few steps on random tokens; shows each call's time with its lower bound."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from handgrad import data
from handgrad.backends import open_backend
from handgrad.backends.ranks.comm import Comm
from handgrad.backends.ranks.startup import open_comm
from handgrad.cli.flags import parse
from handgrad.cli.ranks import requested_ranks
from handgrad.cli.sizes import model_of
from handgrad.core.errors import HandgradError
from handgrad.core.number import whole
from handgrad.optim import AdamW
from handgrad.train.config import ComputeConfig, ModelConfig, RanksConfig
from handgrad.train.datasets import objective_of
from handgrad.train.profile import Profile, Row, profile
from handgrad.train.ranks import together
from handgrad.train.resolve import execution_of, precision_of
from handgrad.train.trainer import Trainer


@dataclass(frozen=True)
class Profiling:
    """Which step, and how it is shown."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2"
    """tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, d6 .. d84 (or any d<layers>), gpt3:c384 .. gpt3:c12288,
    llama3.2-1b, llama3.1-8b, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen3-0.6b, gemma3-270m,
    bert-base, pythia-70m, pythia-160m, pythia-410m, t5-small, t5-base, t5-v1.1-small, t5-v1.1-base;
    or a model on disk: a run, a Hugging Face folder, a .gguf, a .bin, hf:NAME, whose sizes it takes"""
    steps: int = 3
    """whole steps, and as many timed call by call; the table shows medians"""
    by: Literal["op", "phase", "block", "call"] = "op"
    """what the rows of the table are"""
    trace: str = ""
    """also write the calls to this file, for https://ui.perfetto.dev or chrome://tracing"""
    family: str = ModelConfig.family
    """architecture: bert, gemma, gpt2, llama, gpt_neox, t5; empty: the model's own"""
    seq_len: int = 0
    """tokens in a sequence; 0: the model's longest, 2048 at most for a Llama, a T5's targets"""
    vocab_size: int = 0
    """tokens in the vocabulary; 0: the model's"""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)


def main(argv: list[str]) -> int:
    """Prints the table; writes the trace. Of several ranks, rank 0 does."""
    comm = open_comm(requested_ranks("profile", argv))
    with together(comm):
        return profile_on(comm, parse(Profiling, argv, "profile"))


def profile_on(comm: Comm, a: Profiling) -> int:
    """Runs the steps on all ranks."""
    h = a.compute
    if a.steps < 1:
        raise HandgradError("profile", "--steps is at least 1", a.steps)
    if a.trace and not os.path.isdir(Path(a.trace).absolute().parent):
        raise HandgradError("profile", "--trace names a file in a folder that exists", f"'{a.trace}'")
    model = model_of(a.model, a.family, **({"vocab_size": a.vocab_size} if a.vocab_size else {}))
    if getattr(model, "labels", ()):  # random ids are no labels
        raise HandgradError("profile", "a step of masked tokens, spans or next tokens is timed", "a classifier")
    precision, execution = precision_of(h), execution_of(h, ())
    backend = open_backend(h.backend, h.threads, precision, comm)
    T = whole("profile", "--seq-len", a.seq_len, 0) or model.usual_seq_len
    with tempfile.TemporaryDirectory() as folder:
        objective = objective_of(model)
        count = 2 * h.micro_batch * max(objective.window(T)) + 1
        data.write_random(f"{folder}/random.bin", count, objective.vocab_size or model.vocab_size)
        tokens = data.tokens(f"{folder}/random.bin", T, comm.world * h.micro_batch * T, objective=objective)
        trainer = Trainer(model, AdamW(), tokens, execution=execution, precision=precision, backend=backend)
        limits = {"flops_limit": backend.peak_flops(precision.dtype), "bytes_limit": backend.peak_bandwidth()}
        found = profile(trainer, a.steps, **limits)
    if comm.rank > 0:
        return 0
    each = f"{comm.world} ranks, each " if comm.world > 1 else ""
    show(found, a.by, f"{a.model}, {each}{h.micro_batch} x {T} tokens, {precision.dtype}, {backend.hardware}")
    print(
        f"a whole step takes {1e3 * found.step_seconds:.3f} ms,"
        f" {tokens.sequences * tokens.sequence_tokens / found.step_seconds:,.0f} tokens a second"
    )
    show_links(found)
    if backend.is_asynchronous:
        print(
            "each call is launched and awaited alone, which adds some microseconds: short calls look slower than they"
            " are, and the sum exceeds the step"
        )
    if a.trace:
        try:
            found.write_trace(a.trace)
        except OSError as error:
            raise HandgradError("profile", f"{a.trace} must be writable", error.strerror) from None
        print(f"{a.trace}: open it in https://ui.perfetto.dev")
    return 0


def show(found: Profile, by: str, headline: str) -> None:
    """Prints the table, and what its last column means."""
    rows = found.rows(by)
    bounds = [row.bound for row in rows if row.bound is not None]
    has_bound = len(bounds) == len(rows)
    columns = [by, "calls", "ms", "share", "MB", "GFLOP", "GB/s", "TFLOP/s", *(["of bound"] if has_bound else [])]
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*cells(row, found.total))
    total = Row(
        "sum",
        len(found.calls),
        found.total,
        sum(r.nbytes for r in rows),
        sum(r.flops for r in rows),
        sum(bounds) if has_bound else None,
    )
    table.add_row()
    table.add_row(*cells(total, found.total))
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 150)  # a row is one line, whatever the terminal folds
    console.print(headline + "\n", soft_wrap=True)
    console.print(table)
    note = "no bound: the limits of this hardware are not known"
    if found.flops_limit is not None and found.bytes_limit is not None:
        note = (
            f"bound: the longer of a call's bytes at {found.bytes_limit / 1e9:,.0f} GB/s and its flops at"
            f" {found.flops_limit / 1e12:,.1f} TFLOP/s; data that lie in a cache already can beat it"
        )
    console.print("\n" + note, soft_wrap=True)


def show_links(found: Profile) -> None:
    """Prints what ranks exchange, and how much of it computation waits for."""
    for name, calls, nbytes, seconds in found.links():
        speed = f"{nbytes / max(seconds, 1e-9) / 1e9:,.2f} GB/s" if nbytes > 1e6 else "its latency"
        print(f"{name}: {calls} calls send {nbytes / 1e6:,.1f} MB from a rank in {1e3 * seconds:.3f} ms, {speed}")
    if found.links():
        print(f"computation waits {1e3 * found.exposed:.3f} ms of a whole step for other ranks")


def cells(row: Row, total: float) -> list[str]:
    """A row of the table; the last cell only where a bound is known."""
    seconds = max(row.seconds, 1e-9)
    line = [
        row.name,
        str(row.calls),
        f"{1e3 * row.seconds:.3f}",
        f"{100 * row.seconds / max(total, 1e-9):.1f} %",
        f"{row.nbytes / 1e6:,.1f}",
        f"{row.flops / 1e9:,.2f}" if row.flops else "-",
        f"{row.nbytes / seconds / 1e9:,.1f}",
        f"{row.flops / seconds / 1e12:.3g}" if row.flops else "-",
    ]
    return line if row.bound is None else [*line, f"{100 * row.bound / seconds:.0f} %"]
