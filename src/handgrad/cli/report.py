"""handgrad report RUN...: the page of a run, or of several side by side, that any browser shows without a network."""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError
from handgrad.train.report import compare_runs, write_report


@dataclass(frozen=True)
class Report:
    """Which runs, where to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """run folders, finished or running; several are compared"""
    out: str = ""
    """file to write; empty: report.html, in the run's folder, or here for several runs"""


def main(argv: list[str]) -> int:
    """Writes the page and tells where."""
    a = parse(Report, argv, "report")
    if not a.runs:
        raise HandgradError("report", "after the verb come run folders", "none", hint="handgrad report --help")
    for run in a.runs:
        if not os.path.isfile(os.path.join(run, "log.jsonl")):
            what = f"no log.jsonl in '{run}'" if os.path.isdir(run) else f"no folder '{run}'"
            raise HandgradError("report", what, hint="run folders, such as runs/shakespeare-001")
    path = write_report(a.runs[0], a.out) if len(a.runs) == 1 else compare_runs(a.runs, a.out or "report.html")
    print(path)
    return 0
