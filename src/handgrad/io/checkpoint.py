"""Checkpoints that a kill, a full disk or a power cut at any instant cannot spoil.

    step_000500/
        model.safetensors           parameters, by name
        frozen.safetensors          those that do not learn, if there are any
        state.rank00.safetensors    optimizer state and all else that a bit-exact resume needs
        run.json                    {"step": 500, ...}: configuration, scalars, versions
        DONE                        empty; a folder without it is no checkpoint

Saving step 500, and what is left if it is killed between two lines:

    1  write .step_000500.tmp-<pid>/{model, state, frozen}, then run.json,      a temporary folder: never read
       flush all
    2  have the caller flush what belongs to it, such as the log                the same
    3  write DONE in it, flush DONE and the folder                              the same
    4  if step_000500 exists, rename it to step_000500.old                      .old, complete: read as step 500
    5  rename the temporary folder to step_000500, flush the run folder         step_000500, complete
    6  let the link `best` lead to it, if it is the best so far                 the link leads to the older best
    7  delete .old, then what keep_last and keep_every do not keep              under temporary names: never read

A folder gets the name step_000500 only when it is complete and on disk, and renaming is atomic. DONE shows what a name
cannot: whether a copy by other means was completed. The next save first removes temporary folders, and gives a .old
folder its name back if its step is gone. Only one process saves into a run folder.

Weights or state that are not finite are no checkpoint: nothing can be trained from them, and they would be the newest.

Frozen parameters are on disk once: their file is a hard link to that of the newest checkpoint, if every byte of it is
what would be written. So each checkpoint is complete, whichever others are deleted, and a file that was damaged, or
whose values have changed, is written anew. What a disk damages after that, it damages in all that share the file.

`Writer` saves in a thread of its own, while training continues.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the name "bfloat16"
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from handgrad.core.disk import flush, make_folder, require_file, sweep, temporary
from handgrad.core.errors import HandgradError, one_line
from handgrad.core.json_file import read_object

MODEL = "model.safetensors"
FROZEN = "frozen.safetensors"
STATE = "state.rank00.safetensors"
META = "run.json"
DONE = "DONE"
BEST = "best"  # a link to the checkpoint with the lowest validation loss
EMA = "ema"  # begins the names of an average of the weights in the state
COOLED = "cooled_"  # begins the name of a checkpoint that an extended run has set aside: no resume takes it
OLDER = "delete this folder (or its DONE file) to resume from the previous checkpoint"
ANOTHER = "is it another model's?"
Expected = Mapping[str, tuple[tuple[int, ...], DTypeLike]]  # name: shape, dtype
_STEP = re.compile(r"step_(\d{6,})(\.old)?")
_DTYPES = {  # safetensors' name: numpy's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "U64": "uint64",
    "U32": "uint32",
    "U8": "uint8",
}
_EXPONENTS: dict[str, np.unsignedinteger] = {  # the bits of the exponent, in an integer of the type's size
    "float64": np.uint64(0x7FF << 52),
    "float32": np.uint32(0xFF << 23),
    "bfloat16": np.uint16(0xFF << 7),
    "float16": np.uint16(0x1F << 10),
}
_PIECE = 2**16  # elements of which `is_finite` takes the exponents at a time


def save(
    out_dir: str | Path,
    step: int,
    tensors: Mapping[str, np.ndarray],
    state: Mapping[str, np.ndarray],
    meta: dict,
    *,
    frozen: Collection[str] = (),
    keep_last: int = 1,
    keep_every: int = 0,
    keep: Collection[int] = (),
    best: int | None = None,
    when_read: Callable[[], None] = lambda: None,
    before_done: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint and returns its folder, `out_dir`/step_<6 digits>; then prunes (see `prune`).

    tensors, state: name -> array, float32, bfloat16 (ml_dtypes) or integer; copied first unless C-contiguous
    meta: what JSON can hold; "step" is added
    frozen: names of tensors that do not change from checkpoint to checkpoint, in a file that they share
    keep_last, keep_every, keep: see `prune`;  best: the step that the link `best` leads to, which is kept, too
    when_read: called once, when the system has all arrays and they may change again
    before_done: called once, when all but DONE is on disk: whatever must not be missing beside the checkpoint

    Replaces a complete checkpoint of the same step. On failure (full disk, no permission) and for a value that is not
    finite raises HandgradError, removes the temporary folder and leaves every older checkpoint as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 500, {"w": np.ones((2, 3), np.float32)}, {}, {"seed": 1})
    ...     path.name, load_meta(path)["seed"], load(path, {"w": ((2, 3), "float32")})["w"].sum()
    ('step_000500', 1, np.float32(6.0))
    """
    _check_keep(keep_last, keep_every)
    out_dir = Path(out_dir)
    final = out_dir / f"step_{step:06d}"
    building, good = temporary(final), newest(out_dir)
    text = _dumped({**meta, "step": step})
    hint = f"resume from {good}, which is whole, with a lower learning rate" if good else "a lower learning rate"
    for name, array in (*tensors.items(), *state.items()):
        check_finite(f"step {step}", name, array, hint)
    try:
        make_folder(out_dir)
        _clean(out_dir)
        building.mkdir()
        _write_weights(building, tensors, frozen, newest(out_dir))
        _write_tensors(building / STATE, state)
        when_read()
        _complete_folder(building, text, before_done)
        _give_name(building, final)
        if best is not None:
            link_best(out_dir, best)
        prune(out_dir, keep_last, keep_every, keep={step, best, *keep})
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "older checkpoints are untouched; free some space or choose another run folder"
        raise HandgradError("checkpoint", f"{final} must be writable", reason, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)  # already renamed if all went well
    return final


def _dumped(meta: dict) -> str:
    try:
        return json.dumps(meta, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise HandgradError("checkpoint", f"what goes into {META} must be JSON", error) from None


def _complete_folder(folder: Path, meta: str, before_done: Callable[[], None]) -> None:
    """Adds run.json and DONE to the tensors; DONE is the last file, and all are on disk when this returns."""
    for file in folder.iterdir():  # the linked one, too: it may be in a copied run folder, never flushed
        flush(file)
    for name, content in ((META, meta), (DONE, "")):
        if name == DONE:
            before_done()
        (folder / name).write_text(content, encoding="utf-8")
        flush(folder / name)
    flush(folder)


def _give_name(folder: Path, final: Path) -> None:
    """Makes a complete folder the checkpoint `final`, in place of an older one."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    flush(final.parent)
    _delete(old)


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or NaN. Integers are finite.

    Looks at the exponents, a piece at a time: they are all ones in what is not finite, in every type, and bfloat16 has
    no fast comparison of its own.
    """
    exponent = _EXPONENTS.get(array.dtype.name)
    if exponent is None:
        return True
    bits = np.ascontiguousarray(array).reshape(-1).view(exponent.dtype)
    masked = np.empty(min(_PIECE, bits.size), exponent.dtype)
    for at in range(0, bits.size, _PIECE):
        piece = bits[at : at + _PIECE]
        if np.bitwise_and(piece, exponent, out=masked[: piece.size]).max() == exponent:
            return False
    return True


def check_finite(what: object, name: str, array: np.ndarray, hint: str) -> None:
    """Raises NotFiniteError if the tensor `name` of a checkpoint, `what`, holds an infinite value or NaN."""
    if not is_finite(array):
        rule = "weights and optimizer state in a checkpoint must be finite"
        raise NotFiniteError("checkpoint", rule, f"an infinite value or NaN in {name!r} of {what}", hint=hint)


class NotFiniteError(HandgradError):
    """The error of a checkpoint from which nothing can be trained, whether it is to be written or read."""


class Writer:
    """Saves in a thread of its own, one checkpoint at a time. The thread is joined when the process ends.

    It copies nothing: it reads the arrays in place, and they may change again once `wait_until_read` has returned.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._read = threading.Event()
        self._read.set()
        self._saving: Future[Path] | None = None

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the previous checkpoint, then starts `save` with these arguments and returns."""
        self.wait()
        self._read.clear()
        self._saving = self._thread.submit(self._save, *args, **kwargs)

    def wait_until_read(self) -> None:
        """Waits until the arrays may change. Raises the error of a save that has ended."""
        self._read.wait()
        self.check()

    def check(self) -> None:
        """Raises the error of a save that has ended, once; waits for none."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint is complete. Raises the error of its save, once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, *args: Any, **kwargs: Any) -> Path:
        try:
            return save(*args, **kwargs, when_read=self._read.set)
        finally:
            self._read.set()


def load(path: str | Path, expected: Expected) -> "Tensors":
    """Returns the model's tensors in checkpoint `path`: name -> array, each read from disk at every access.

    expected: name -> (shape, dtype), dtype as numpy takes it or "bfloat16"

    Raises HandgradError if `path` is no complete checkpoint, the file is damaged, or a tensor is missing, unexpected,
    or of another shape or type. All are checked here, before the first is read.
    """
    files = [_checked_folder(path) / MODEL, Path(path) / FROZEN]
    return Tensors(files if os.path.lexists(files[1]) else files[:1], expected)


def load_state(path: str | Path, expected: Expected, others: bool = False, hint: str = ANOTHER) -> "Tensors":
    """Returns the tensors of the optimizer state in checkpoint `path`; otherwise as `load`.

    others: there may be more of them;  hint: of the error of a tensor that is missing, unexpected or of another kind
    """
    return Tensors([_checked_folder(path) / STATE], expected, others, hint)


def load_meta(path: str | Path, expected: Mapping[str, type] | None = None) -> dict:
    """Returns the run.json of checkpoint `path`: what `save` got as meta, and "step".

    expected: key -> type of the value, for keys that must be there

    Raises HandgradError if `path` is no complete checkpoint, or its run.json is damaged or lacks a key.
    """
    file = _checked_folder(path) / META
    meta = read_object(file, "checkpoint", hint=OLDER)
    for key, kind in {"step": int, **(expected or {})}.items():
        # JSON has one number type in two spellings, and True is an int to Python
        kinds = (int, float) if kind is float else kind
        if not isinstance(meta.get(key), kinds) or (kind is not bool and isinstance(meta.get(key), bool)):
            found = type(meta[key]).__name__ if key in meta else "nothing"
            raise HandgradError("checkpoint", f"{file} must hold {key!r} of type {kind.__name__}", found)
    if meta["step"] < 0:
        raise HandgradError("checkpoint", f"{file} must hold a step of at least 0", meta["step"])
    return meta


def is_checkpoint(path: Path) -> bool:
    """Whether a folder, or what a link to one leads to, has the name of a checkpoint; it may be incomplete."""
    return path.resolve().name.startswith(("step_", COOLED))


def newest(out_dir: str | Path) -> Path | None:
    """Returns the folder of the complete checkpoint with the highest step in `out_dir`, or None."""
    return next(iter(complete(out_dir)), None)


def complete(out_dir: str | Path, until: int | None = None) -> list[Path]:
    """Returns the folders of the complete checkpoints in `out_dir`, up to a step, the highest step first."""
    found = sorted(_checkpoints(Path(out_dir)).items(), reverse=True)
    return [path for step, path in found if until is None or step <= until]


def link_best(out_dir: str | Path, step: int) -> None:
    """Lets the link `best` lead to the checkpoint of a step; without a complete one of it, removes the link."""
    link, found = Path(out_dir) / BEST, _checkpoints(Path(out_dir)).get(step)
    if found is None:
        if link.is_symlink():
            link.unlink()
        return
    new = temporary(link)
    new.unlink(missing_ok=True)
    new.symlink_to(found.name)
    new.replace(link)
    flush(link.parent)


def state_names(path: str | Path) -> set[str]:
    """Returns the names of the tensors of the optimizer state in checkpoint `path`."""
    file = _checked_folder(path) / STATE
    require_file(file, "a checkpoint's tensors", "checkpoint", OLDER)
    return set(_readable(file, lambda: safe_open(file, "np", backend="pread").keys()))


def prune(out_dir: str | Path, keep_last: int, keep_every: int = 0, *, keep: Collection[int | None] = ()) -> None:
    """Deletes checkpoints, except the `keep_last` highest steps, multiples of `keep_every` (0: none) and steps in
    `keep`."""
    _check_keep(keep_last, keep_every)
    found = _checkpoints(Path(out_dir))
    for step in sorted(found)[:-keep_last]:
        if step not in keep and (keep_every == 0 or step % keep_every):
            _delete(found[step])


class Tensors(Mapping):
    """The tensors of safetensors files: name -> array, a fresh copy read from disk at each access."""

    def __init__(self, paths: Sequence[Path], expected: Expected, others: bool = False, hint: str = ANOTHER):
        self._places: dict[str, tuple[Path, Any]] = {}  # name: its file, which is open
        for path in paths:
            # pread, not mmap: with mmap, pages that were read stay in the process's memory after the array is dropped
            require_file(path, "a checkpoint's tensors", "checkpoint", OLDER)
            file = _readable(path, safe_open, path, "np", backend="pread")
            self._places |= {name: (path, file) for name in _readable(path, file.keys)}
        where, names = " or ".join(map(str, paths)), self._places.keys()
        missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing:
            rule = f"{where} must hold the tensor {missing[0]!r}"
            raise HandgradError("checkpoint", rule, _more("no such", missing), hint=hint)
        if extra and not others:
            rule = f"{where} must hold only the {len(expected)} expected tensors"
            raise HandgradError("checkpoint", rule, _more(f"also {extra[0]!r}", extra), hint=hint)
        for name, (shape, dtype) in expected.items():
            path, file = self._places[name]
            header = _readable(path, file.get_slice, name)
            found = _spec(header.get_shape(), _DTYPES.get(header.get_dtype(), header.get_dtype()))
            if found != _spec(shape, np.dtype(dtype).name):
                rule = f"tensor {name!r} in {path} must be {_spec(shape, np.dtype(dtype).name)}"
                raise HandgradError("checkpoint", rule, found, hint=hint)
        self._names = dict.fromkeys(expected)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        path, file = self._places[name]
        return _readable(path, file.get_tensor, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _readable(path: Path, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return read(*args, **kwargs)
    except (OSError, SafetensorError) as error:
        rule = f"{path} must be a whole safetensors file"
        raise HandgradError("checkpoint", rule, one_line(error), hint=OLDER) from None


def _spec(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype} ({', '.join(str(size) for size in shape)})"


def _more(first: str, names: list[str]) -> str:
    return first + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # alive until all is written
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name,
            shape=tensors[name].shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    serialize_file(specs, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it private; use the umask, as for run.json


def _write_weights(folder: Path, tensors: Mapping[str, np.ndarray], frozen: Collection[str], last: Path | None) -> None:
    """Writes weights into a folder; those in `frozen` as a link to the file of the checkpoint `last`, if that holds the
    same."""
    _write_tensors(folder / MODEL, {name: array for name, array in tensors.items() if name not in frozen})
    still = {name: array for name, array in tensors.items() if name in frozen}
    if still and last is not None and _holds(last / FROZEN, still):
        with suppress(OSError):  # a disk without links, or a file of another user
            os.link((last / FROZEN).resolve(), folder / FROZEN)
            return
    if still:
        _write_tensors(folder / FROZEN, still)


def _holds(path: Path, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file holds exactly these tensors, byte for byte."""
    try:
        held = Tensors([path], {name: (array.shape, array.dtype) for name, array in tensors.items()})
        return all(_is_same(held[name], array) for name, array in tensors.items())
    except HandgradError:
        return False


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape and type have the same bytes; compares a piece at a time."""
    x, y = (np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in (a, b))
    return all(np.array_equal(x[at : at + _PIECE], y[at : at + _PIECE]) for at in range(0, x.size, _PIECE))


def _checked_folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise HandgradError("checkpoint", "a checkpoint must be a folder", f"no folder {path}")
    if not (path / DONE).is_file():
        hint = "it was not completely written or copied; use another one"
        raise HandgradError("checkpoint", f"{path} must be complete", "no file DONE in it", hint=hint)
    return path


def _checkpoints(out_dir: Path) -> dict[int, Path]:
    """Returns step -> folder of the complete checkpoints; a .old folder counts if its step has no other."""
    found = {}
    for path in sorted(out_dir.glob("step_*"), reverse=True):  # step_000500.old before step_000500
        match = _STEP.fullmatch(path.name)
        if match and (path / DONE).is_file():
            found[int(match[1])] = path
    return found


def _clean(out_dir: Path) -> None:
    sweep(out_dir, _STEP.pattern, is_locked=True)  # not step_000500.bin, which `convert` writes here
    for old in out_dir.glob("step_*.old"):
        final = old.with_suffix("")
        if (final / DONE).is_file() or not (old / DONE).is_file():
            _delete(old)
        else:
            _delete(final)
            old.rename(final)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint, if it exists, under a temporary name: half a folder never has a checkpoint's name."""
    if folder.exists():
        going = temporary(folder)
        folder.rename(going)
        flush(folder.parent)  # a power cut must not lose the new name and keep what follows
        shutil.rmtree(going)


def _check_keep(keep_last: int, keep_every: int) -> None:
    if keep_last < 1 or keep_every < 0:
        rule = "keep_last must be at least 1 and keep_every at least 0"
        raise HandgradError("checkpoint", rule, f"{keep_last} and {keep_every}")
