"""The run folder: its name, the lock on it, what is undone if a run never begins, and the settings saved in it."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from handgrad.core.errors import HandgradError
from handgrad.io import newest
from handgrad.models import preset
from handgrad.train.config import SIZES, Config, ModelConfig, from_names

SETTINGS = "config.json"
UNRECORDED = ("out", "resume", "config", "threads", "verbose")  # changing these changes no result
RETIRED = {"head_chunks": 0}  # settings that only earlier versions had, with their defaults


def run_folder(c: Config) -> Path:
    """--resume's, --out, or runs/<data>-NNN: the next free number, or the last taken one to resume "auto".

    Raises HandgradError for a name that the system does not take.
    """
    r = c.run
    for name in (r.out, r.resume):
        check_name(name)
    if r.resume not in ("", "auto"):
        if r.out and Path(r.out) != Path(r.resume):
            rule = "--resume names the run folder, and --out the same or none"
            raise HandgradError("resume", rule, f"'{r.resume}' and '{r.out}'")
        if newest(r.resume) is None:
            what = f"no complete checkpoint in '{r.resume}'" if Path(r.resume).is_dir() else f"no folder '{r.resume}'"
            hint = f"--resume auto --out {r.resume} starts afresh where there is none"
            raise HandgradError("resume", what, hint=hint)
        return Path(r.resume)
    if r.out:
        return Path(r.out)
    stem = re.split(r"[*?\[]", Path(c.data.train).name)[0].strip("_-.") or "run"
    taken = [int(p.name[len(stem) + 1 :]) for p in Path("runs").glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdigit()]
    number = max(taken, default=0) + (0 if r.resume and taken else 1)
    return Path("runs") / f"{stem}-{number:03d}"


def check_name(folder: str) -> None:
    """Raises HandgradError if no file can be at this place: the name is too long, say, or another user's."""
    try:
        (Path(folder) / "log.jsonl").stat()
    except (FileNotFoundError, NotADirectoryError):  # a file in the way is found when the folder is made
        return
    except (OSError, ValueError) as error:
        shown = repr(folder if len(folder) <= 80 else folder[:77] + "...")
        reason = getattr(error, "strerror", None) or str(error)  # a ValueError: a character that no name can hold
        raise HandgradError("run", f"the run folder {shown} cannot be used: {reason}", hint="another --out") from None


@contextmanager
def claim(out: Path, resume: str) -> Iterator[ExitStack]:
    """Makes the run folder and locks it for this process until the yielded lock is closed.

    If the block raises, everything is removed that was not there before. Raises HandgradError if the folder holds
    another run, cannot be written, or another process trains in it.
    """
    if (out / "log.jsonl").exists() and not resume:
        hint = f"--resume {out if newest(out) else f'auto --out {out}'}, or another --out"
        raise HandgradError("run", f"'{out}' already holds a run", hint=hint)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = set(out.iterdir())
        (out / ".writable").touch()
        (out / ".writable").unlink()
        held = lock(out)
    except OSError as error:
        remove_empty(made)
        rule = f"the run folder '{out}' cannot be written: {error.strerror}"
        raise HandgradError("run", rule, hint="another --out") from None
    try:
        yield held
    except BaseException:
        held.close()
        for path in set(out.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_empty(made)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Removes those folders, the innermost first, in which nothing lies: another run may have begun beside it."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


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
    """The settings in the run folder that `c` resumes, or None: defaults to parse the command line over."""
    out = run_folder(c)
    path = out / SETTINGS
    if not path.is_file():
        return None
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        values = current(groups)
        if not {"model", "data", "optim", "run"} <= groups.keys():
            raise ValueError("groups are missing")
    except (OSError, ValueError, RecursionError) as error:
        raise HandgradError("resume", f"'{path}' holds the settings of a run", error) from None
    saved = from_names(values)
    return leave_sizes(replace(saved, run=replace(saved.run, out=str(out))), c)


def leave_sizes(saved: Config, c: Config) -> Config:
    """Saved settings as defaults of a command line that on its own gives `c`: sizes that are the preset's are left to
    it. If another preset is asked for, all sizes are: it is another model."""
    m = saved.model
    own = preset(f"d{m.depth}" if m.depth else m.preset)
    other = (c.model.preset, c.model.depth) not in ((m.preset, m.depth), (ModelConfig.preset, ModelConfig.depth))
    sizes: dict[str, Any] = {name: 0 for name in SIZES if other or getattr(m, name) == own[name]}
    return replace(saved, model=replace(m, **sizes))


def current(groups: Any) -> dict[str, Any]:
    """Saved settings by name, without those that only earlier versions had."""
    return {name: value for name, value in flat(groups).items() if name not in RETIRED}


def flat(groups: Any) -> dict[str, Any]:
    """Settings by name from {group: {name: value}}, in whatever groups. Raises ValueError for another shape."""
    if not isinstance(groups, dict) or not all(isinstance(values, dict) for values in groups.values()):
        raise ValueError("it holds no groups of settings")
    return {name: value for values in groups.values() for name, value in values.items()}


def changes(out: Path, c: Config) -> str:
    """Which settings differ from those saved in a run folder, as a sentence; empty if none does."""
    try:
        before = flat(json.loads((out / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):  # a converted model has none
        return ""
    found = []
    for name, value in flat(asdict(c)).items():
        was = before.get(name, value)
        if was != value and name not in UNRECORDED:
            found.append(f"{name.replace('_', '-')} is {value!r}, not {was!r}")
    for name, default in RETIRED.items():
        was = before.get(name, default)
        if was != default:
            found.append(f"{name.replace('_', '-')} {was!r} of an earlier version has no effect")
    return ", ".join(found)
