"""The run folder: its name, the lock on it, what is undone if a run never begins, and the settings saved in it."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from handgrad.core.disk import make_folder, sweep, temporary, write_text
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object
from handgrad.infer.load import TOKENIZER
from handgrad.io import newest
from handgrad.io.checkpoint import DONE
from handgrad.models import preset
from handgrad.tokenizers import OwnTemplate, Tokenizer
from handgrad.train.config import DERIVED_SIZES, SIZES, Config, ModelConfig, from_names

SETTINGS = "config.json"
UNRECORDED = (
    "out",
    "resume",
    "config",
    "threads",
    "verbose",
    "tokens",
    "epochs",
    "extend",
    "fresh_optimizer",
)  # changing these changes no result
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
            raise HandgradError("resume", what, hint=instead_of(Path(r.resume)))
        return Path(r.resume)
    if r.out:
        return Path(r.out)
    stem = re.split(r"[*?\[]", Path(c.data.train).name)[0].strip("_-.") or "run"
    taken = [
        int(p.name[len(stem) + 1 :]) for p in Path("runs").glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdecimal()
    ]
    number = max(taken, default=0) + (0 if r.resume and taken else 1)
    return Path("runs") / f"{stem}-{number:03d}"


def instead_of(path: Path) -> str:
    """What to write instead of --resume PATH, where no checkpoint is."""
    if newest(path.parent) is not None and path.resolve().name.startswith("step_"):
        return f"--resume {path.parent}"
    if path.is_file() or any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return f"--init {path} starts a new run from a model"
    if (path / "meta.json").exists():
        return f"--train {path}"
    return f"--resume auto --out {path} starts afresh where there is none"


def check_name(folder: str) -> None:
    """Raises HandgradError if no file can be at this place: the name is too long, say, or another user's."""
    try:
        (Path(folder) / "log.jsonl").stat()
    except (FileNotFoundError, NotADirectoryError):  # a file in the way is found when the folder is made
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)  # a ValueError: a character that no name can hold
        rule = f"the run folder {folder!r} cannot be used: {reason}"
        raise HandgradError("run", rule, hint="another --out") from None


class Lock:
    """The lock of this process on a run folder, until it is closed or the process dies. A context manager.

    Raises HandgradError if another process holds it, OSError if there is no such folder.
    """

    def __init__(self, folder: Path):
        self.folder, self._handle = folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise HandgradError("run", f"another process is training in '{folder}'") from None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._handle)

    def is_lost(self) -> bool:
        """Whether the name of the folder leads to another one, or nowhere: it was deleted, moved or replaced."""
        try:
            return not os.path.samestat(os.stat(self.folder), os.fstat(self._handle))
        except OSError:
            return True

    def renew(self) -> None:
        """Makes the folder again and locks it. Raises HandgradError if another run is there, or it cannot be made."""
        rule, hint = f"the run folder '{self.folder}' was deleted or moved during the run", "leave it alone"
        try:
            make_folder(self.folder)
            if any((self.folder / name).exists() for name in ("log.jsonl", SETTINGS)):
                raise HandgradError("run", f"{rule}, and another run is there now", hint=hint)
            new = Lock(self.folder)
        except OSError as error:
            raise HandgradError("run", f"{rule}, and cannot be made again: {error.strerror}", hint=hint) from None
        self._handle, new._handle = new._handle, self._handle
        new.close()


def describe(
    out: Path, settings: Mapping[str, Any], memory: str, tokenizer: Tokenizer | None, template: OwnTemplate
) -> None:
    """Writes what a reader, `handgrad generate` and a resumption need to know into a run folder.

    settings: by group;  memory: the memory map;  tokenizer: None if it is not known
    template: of chats; what ends their turns ends a text of the run
    """
    write_text(out / SETTINGS, json.dumps(settings, indent=2) + "\n")
    write_text(out / "memory.txt", memory + "\n")
    if tokenizer is not None:
        spec, ends = tokenizer.save(out), dict.fromkeys([*tokenizer.ends, *template.ends])
        spec |= {"eot": list(ends)} if len(ends) > len(tokenizer.ends) else {}
        write_text(out / TOKENIZER, json.dumps(spec) + "\n")
    template.save(out)


def holds_run(out: Path) -> bool:
    """Whether a folder holds a run, or a model, which a new run must not mix with."""
    return (out / "log.jsonl").exists() or (out / SETTINGS).exists() or newest(out) is not None


@contextmanager
def claim(out: Path, resume: str) -> Iterator[Lock]:
    """Makes the run folder, locks it for this process, and deletes what dead processes left there half written.

    If the block raises, everything is removed that was not there before, and the lock is closed; otherwise it is the
    caller's to close. Raises HandgradError if the folder holds another run, cannot be written, or another process
    trains in it.
    """
    if holds_run(out) and not resume:
        hint = f"--resume {out if newest(out) else f'auto --out {out}'}, or another --out"
        raise HandgradError("run", f"'{out}' already holds a run", hint=hint)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        make_folder(out)
        held = Lock(out)
    except OSError as error:
        remove_empty(made)
        raise unwritable(out, error) from None
    try:
        sweep(out)
        before = set(out.iterdir())
        temporary(out / "probe").touch()
        temporary(out / "probe").unlink()
    except OSError as error:
        held.close()
        remove_empty(made)
        raise unwritable(out, error) from None
    try:
        yield held
    except BaseException:
        held.close()
        with suppress(FileNotFoundError):  # somebody else has deleted it
            for path in set(out.iterdir()) - before:
                if (path / DONE).exists():  # a checkpoint that has another name now
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_empty(made)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Removes those folders, the innermost first, in which nothing lies: another run may have begun beside it."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def unwritable(out: Path, error: OSError) -> HandgradError:
    """The error of a run folder that cannot be made, locked or written."""
    file = next((path for path in (out, *out.parents) if os.path.isfile(path)), None)
    rule = f"the run folder '{out}' cannot be written: " + (f"'{file}' is a file" if file else str(error.strerror))
    return HandgradError("run", rule, hint="another --out")


def saved_settings(c: Config) -> Config | None:
    """The settings in the run folder that `c` resumes, or None: defaults to parse the command line over."""
    out = run_folder(c)
    path = out / SETTINGS
    if not os.path.exists(path):
        return None
    groups = read_object(path, "resume")
    try:
        values = current(groups)
        if not {"model", "data", "optim", "run"} <= groups.keys():
            raise ValueError("groups are missing")
    except ValueError as error:
        raise HandgradError("resume", f"'{path}' holds the settings of a run", error) from None
    saved = from_names(values)
    return leave_sizes(replace(saved, run=replace(saved.run, out=str(out))), c)


def leave_sizes(saved: Config, c: Config) -> Config:
    """Saved settings as defaults of a command line that on its own gives `c`: sizes that are the preset's are left to
    it. If another preset is asked for, all sizes are: it is another model."""
    m = saved.model
    own = preset(f"d{m.depth}" if m.depth else m.preset, m.family)
    other = (c.model.preset, c.model.depth) not in ((m.preset, m.depth), (ModelConfig.preset, ModelConfig.depth))
    own_sizes = [name for name in SIZES if name not in DERIVED_SIZES and getattr(m, name) == getattr(own, name, 0)]
    sizes: dict[str, Any] = dict.fromkeys(SIZES if other else own_sizes, 0)
    return replace(saved, model=replace(m, **sizes))


def current(groups: Any) -> dict[str, Any]:
    """Saved settings by name, without those that only earlier versions had, and with None where they wrote ""."""
    values = {name: value for name, value in flat(groups).items() if name not in RETIRED}
    return values | {name: None for name in ("cooldown_shape",) if values.get(name) == ""}


def flat(groups: Any) -> dict[str, Any]:
    """Settings by name from {group: {name: value}}, in whatever groups. Raises ValueError for another shape."""
    if not isinstance(groups, dict) or not all(isinstance(values, dict) for values in groups.values()):
        raise ValueError("it holds no groups of settings")
    return {name: value for values in groups.values() for name, value in values.items()}


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """The settings in a run folder by group; none if they cannot be read."""
    try:
        groups = read_object(out / SETTINGS, "resume")
        flat(groups)
    except (HandgradError, ValueError):
        return {}
    return groups


def changes(out: Path, c: Config) -> str:
    """Which settings differ from those saved in a run folder, as a sentence; empty if none does."""
    before = flat(recorded(out)) | current(recorded(out))
    if not before:  # a converted model has none
        return ""
    found = []
    if "lr" not in before:  # of a run from Python, which has its own schedule, or of a converted one
        found.append(f"the learning rate is that of schedule {c.optim.schedule} with its peak at {c.optim.lr:g}")
    for name, value in flat(asdict(c)).items():
        was = before.get(name, value)
        if was != value and name not in UNRECORDED:
            found.append(f"{name.replace('_', '-')} is {value!r}, not {was!r}")
    for name, default in RETIRED.items():
        was = before.get(name, default)
        if was != default:
            found.append(f"{name.replace('_', '-')} {was!r} of an earlier version has no effect")
    return ", ".join(found)
