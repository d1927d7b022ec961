"""The run folder: its name, the lock on it, what is undone if a run never begins, and the settings saved in it."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from handgrad.core.disk import make_folder
from handgrad.core.errors import HandgradError
from handgrad.io import newest
from handgrad.models import preset
from handgrad.train.config import SIZES, Config, DataConfig, ModelConfig, OptimConfig, RunConfig

SETTINGS = "config.json"
UNRECORDED = {("run", name) for name in ("out", "resume", "steps", "threads")}  # changing these changes no result
RETIRED = {("run", "head_chunks"): 0}  # settings that only earlier versions had, with their defaults


def run_folder(c: Config) -> Path:
    """--run.resume's, --run.out, or runs/<data>-NNN: the next free number, or the last taken one to resume "auto"."""
    r = c.run
    if r.resume not in ("", "auto"):
        if r.out and Path(r.out) != Path(r.resume):
            rule = "--run.resume names the run folder, and --run.out the same or none"
            raise HandgradError("resume", rule, f"'{r.resume}' and '{r.out}'")
        if newest(r.resume) is None:
            what = f"no complete checkpoint in '{r.resume}'" if Path(r.resume).is_dir() else f"no folder '{r.resume}'"
            hint = f"--run.resume auto --run.out {r.resume} starts afresh where there is none"
            raise HandgradError("resume", what, hint=hint)
        return Path(r.resume)
    if r.out:
        return Path(r.out)
    stem = re.split(r"[*?\[]", Path(c.data.train).name)[0].strip("_-.") or "run"
    taken = [int(p.name[len(stem) + 1 :]) for p in Path("runs").glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdigit()]
    number = max(taken, default=0) + (0 if r.resume and taken else 1)
    return Path("runs") / f"{stem}-{number:03d}"


@contextmanager
def claim(out: Path, resume: str) -> Iterator[ExitStack]:
    """Makes the run folder and locks it for this process until the yielded lock is closed.

    If the block raises, everything is removed that was not there before. Raises HandgradError if the folder holds
    another run, cannot be written, or another process trains in it.
    """
    if (out / "log.jsonl").exists() and not resume:
        hint = f"--run.resume {out if newest(out) else f'auto --run.out {out}'}, or another --run.out"
        raise HandgradError("run", f"'{out}' already holds a run", hint=hint)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        make_folder(out)
        before = set(out.iterdir())
        (out / ".writable").touch()
        (out / ".writable").unlink()
        held = lock(out)
    except OSError as error:
        rule = f"the run folder '{out}' cannot be written: {error.strerror}"
        raise HandgradError("run", rule, hint="another --run.out") from None
    try:
        yield held
    except BaseException:
        held.close()
        for path in set(out.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            if not any(folder.iterdir()):  # another run may have begun beside it
                folder.rmdir()
        raise


def lock(folder: Path) -> ExitStack:
    """Locks a folder until the result is closed or the process dies. Raises HandgradError if another holds it."""
    held, handle = ExitStack(), os.open(folder, os.O_RDONLY)
    held.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise HandgradError("run", f"another process is training in '{folder}'") from None
    return held


def saved_settings(c: Config) -> Config | None:
    """The settings in the run folder that `c` resumes, or None: defaults to parse the command line over.

    Sizes that are the preset's are left to it. If another preset is asked for, all sizes are: it is another model.
    """
    out = run_folder(c)
    path = out / SETTINGS
    if not path.is_file():
        return None
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        kept = {f.name: current(f.name, groups[f.name]) for f in fields(Config)}
        saved = Config(
            ModelConfig(**kept["model"]),
            DataConfig(**kept["data"]),
            OptimConfig(**kept["optim"]),
            RunConfig(**kept["run"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HandgradError("resume", f"'{path}' holds the settings of a run", error) from None
    m = saved.model
    own = preset(f"d{m.depth}" if m.depth else m.preset)
    other = (c.model.preset, c.model.depth) not in ((m.preset, m.depth), (ModelConfig.preset, ModelConfig.depth))
    sizes: dict[str, Any] = {name: 0 for name in SIZES if other or getattr(m, name) == own[name]}
    return replace(saved, model=replace(m, **sizes), run=replace(saved.run, out=str(out)))


def current(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """The saved settings of a group without those that only earlier versions had."""
    return {name: value for name, value in values.items() if (group, name) not in RETIRED}


def changes(out: Path, c: Config) -> str:
    """Which settings differ from those saved in a run folder, as a sentence; empty if none does."""
    try:
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a converted model has none
        return ""
    found = []
    for group, values in asdict(c).items():
        for name, value in values.items():
            was = before.get(group, {}).get(name, value)
            if was != value and (group, name) not in UNRECORDED:
                found.append(f"{group}.{name.replace('_', '-')} is {value!r}, not {was!r}")
    for (group, name), default in RETIRED.items():
        was = before.get(group, {}).get(name, default)
        if was != default:
            found.append(f"{group}.{name.replace('_', '-')} {was!r} of an earlier version has no effect")
    return ", ".join(found)
