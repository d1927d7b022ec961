"""The report of one run, or of several side by side: one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

from handgrad.core.disk import write_text
from handgrad.core.errors import HandgradError
from handgrad.train.report.page import comparison, single
from handgrad.train.report.read import read_run

__all__ = ["compare_runs", "write_report"]


def write_report(out_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes a run's page, report.html in its folder unless `path` is another place, and returns its path. It shows

    log.jsonl    the curves
    run.json     its "summary", a flat object: model, params, tokens, hardware, dtype, and anything else
    config.json  the resolved settings, nested
    eval.json    what `handgrad eval` measured
    sample.txt, memory.txt  shown as they are

    Any of them may be missing. Raises HandgradError if one is damaged, or the report cannot be written.
    """
    path = Path(path or Path(out_dir) / "report.html")
    write_text(path, single(read_run(Path(out_dir))))
    return path


def compare_runs(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Writes a page that compares runs, at least two, and returns its path. Raises HandgradError as `write_report`."""
    if len(folders) < 2:
        raise HandgradError("report", "a comparison is of two runs or more", len(folders))
    write_text(Path(path), comparison([read_run(Path(folder)) for folder in folders]))
    return Path(path)
