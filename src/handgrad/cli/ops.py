"""handgrad ops [check|grad|bench] [OP...]: the support table; ops against the oracle, differences, the clock."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from handgrad.backends import open_backend
from handgrad.backends.cuda.planner import GpuPlanner
from handgrad.cli.flags import parse
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.core.listing import attribute
from handgrad.core.op import Case, Op
from handgrad.ops import OPS
from handgrad.testing import bench_case, check_case, gradcheck_op


@dataclass(frozen=True)
class Ops:
    """What to do with which ops."""

    mode: Annotated[
        Literal["support", "check", "grad", "bench"], tyro.conf.Positional, tyro.conf.arg(metavar="MODE")
    ] = "support"
    """support: who implements what; check: error against the oracle over tolerance; grad: gradient rules against finite
    differences; bench: time, GB/s and GFLOP/s of the cases from real models"""
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OP...", help_behavior_hint="")] = ()
    """op names; none: all"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """whose kernels are checked or timed"""
    threads: int = 0
    """CPU threads; 0: the physical cores that this process may use"""


def main(argv: list[str]) -> int:
    """Prints a table; the exit code is 1 if a check fails."""
    a = parse(Ops, argv, "ops")
    unknown = [n for n in a.names if n not in OPS]
    if unknown:
        hint = did_you_mean(unknown[0], OPS)
        raise HandgradError("ops", f"an op is one of {', '.join(OPS)}", f"'{unknown[0]}'", hint=hint)
    chosen: list[Op] = [OPS[n] for n in a.names or OPS]
    if a.mode == "support":
        table, failed = support(chosen), False
    else:
        mode = {"check": check, "grad": grad, "bench": bench}[a.mode]
        backend = open_backend(a.backend, a.threads)
        table, failed = mode([op for op in chosen if backend.has(op)], backend)
    table.columns[0].no_wrap = True
    console = Console(highlight=False, markup=False, emoji=False)  # db:M:f32 is no picture of an M
    if not console.is_terminal:
        console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table)
    if a.mode == "support":
        console.print()
        for op in chosen:
            console.print(f"{op.name}: {op.ins} -> {op.outs}", soft_wrap=not console.is_terminal)
    return 1 if failed else 0


def sizes(case: Case) -> str:
    """A case's sizes in a cell."""
    return " ".join(f"{name}={attribute(size)}" for name, size in case.sizes.items())


def support(ops: list[Op]) -> Table:
    """Op by backend; what they read and write is printed below."""
    backends = open_backend("cpu"), GpuPlanner("h100")
    table = Table("op", "oracle", *[b.name for b in backends], "gradient", "cases", box=None)
    for op in ops:
        rule = "its own" if op.starts_gradient else "rule" if type(op).backward is not Op.backward else "-"
        has = ["f32 bf16" if b.has(op) else "-" for b in backends]
        table.add_row(op.name, "yes", *has, rule, str(len(op.cases)))
    return table


def check(ops: list[Op], backend) -> tuple[Table, bool]:
    """The worst error / tolerance of every op and dtype over its cases."""
    table, failed = Table("op", "dtype", "worst case", "output", "error", "error / tolerance", "", box=None), False
    for op in ops:
        for name in ("f32", "bf16"):
            found = [(e, c) for c in op.cases for e in check_case(op, c, backend, DTYPES[name])]
            worst, case = max(found, key=lambda pair: pair[0].ratio)
            failed |= worst.ratio > 1
            verdict = "ok" if worst.ratio <= 1 else "FAILED"
            table.add_row(op.name, name, sizes(case), worst.out, f"{worst.error:.2e}", f"{worst.ratio:.2f}", verdict)
    return table, failed


def grad(ops: list[Op], backend) -> tuple[Table, bool]:
    """Gradient rules against central differences in float64."""
    table, failed = Table("op", "case", "relative error", "", box=None), False
    for op in ops:
        for case in op.cases:
            if not case.real and (type(op).backward is not Op.backward):
                error = gradcheck_op(op, case)
                failed |= error > 1e-6
                table.add_row(op.name, sizes(case), f"{error:.1e}", "ok" if error <= 1e-6 else "FAILED")
    return table, failed


def bench(ops: list[Op], backend) -> tuple[Table, bool]:
    """Median time of the cases that have a real model's shape."""
    table = Table("op", "dtype", "shape of", "ms", "GB/s", "GFLOP/s", box=None)
    for op in ops:
        for case in (c for c in op.cases if c.real):
            for name in ("f32", "bf16"):
                t = bench_case(op, case, backend, DTYPES[name])
                speed = f"{t.gflops:.1f}" if t.gflops else "-"
                table.add_row(op.name, name, case.real, f"{t.seconds * 1e3:.3f}", f"{t.gbps:.1f}", speed)
    return table, False
