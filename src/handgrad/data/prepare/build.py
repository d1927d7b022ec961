"""Writes the parts of a source into a folder of shards: in order, resumable, with checksums.

Everything is written to OUT/.preparing and moved to OUT when complete, so OUT never holds an incomplete data set. After
every shard, progress.json records the next job and how many of its ids are in shards already. If a run is killed, the
next one with the same source and settings continues from there. Its shards are identical to the byte, because the ids
follow the order of the source, not that of the workers.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from handgrad.core.disk import flush, make_folder, require_file, write_text, write_whole
from handgrad.core.errors import HandgradError
from handgrad.core.json_file import read_object
from handgrad.core.number import I64_MAX
from handgrad.data.meta import META, read_meta, sha256_of
from handgrad.data.prepare.workers import Damage, Encoder, Job, tokenize
from handgrad.data.shards import id_dtype, open_shard, write_shard

SUMS = "SHA256SUMS"
SPLITS = ("train", "val")
_PROGRESS = "progress.json"
_SHARD_NAME = re.compile(r"(train|val)_\d{6}\.(bin|mask)")

Jobs = Callable[[Path], Iterator[tuple[int, Job]]]
Progress = Callable[[int, int, int], None]
_Place = tuple[int, int, int, Damage]  # part, job, ids of the job before this place, damage in all jobs so far
_Piece = tuple[tuple[str, int], np.ndarray, _Place]  # (split, index of the shard), ids, the place after them


@dataclass(frozen=True)
class Part:
    """A file of the source, or a range of one.

    name: its name without local folders
    size: its bytes
    sha256: of the whole file; empty if the name contains a revision
    get: returns its path, after downloading it if necessary
    jobs: yields (bytes of the part covered when the job is done, job), the same jobs at every call
    split: "train" or "val"; "" if Settings.val_tokens decides
    """

    name: str
    size: int
    sha256: str
    get: Callable[[], Path]
    jobs: Jobs
    split: str = ""


@dataclass(frozen=True)
class Settings:
    """How `build` writes shards.

    shard_tokens: tokens in a full shard
    val_tokens: the first tokens, which are val, for parts without a split
    wants_val: an empty val is an error
    workers: processes that tokenize
    replace: the folder's shards of another source or tokenizer are replaced
    val_flag: the flag that sets val_tokens, for the error's hint; "" if there is none
    about: what else meta.json says
    special: special tokens spelled out in the text are tokens
    on_error: what the parts' jobs do with damaged rows
    source: what else their documents depend on, such as columns. A build that was stopped starts over under another
    """

    shard_tokens: int = 100_000_000
    val_tokens: int = 0
    wants_val: bool = True
    workers: int = 1
    replace: bool = False
    val_flag: str = ""
    about: dict = field(default_factory=dict)
    special: bool = False
    on_error: str = "stop"
    source: tuple = ()


@dataclass
class _Done:
    """Progress of a build: the next part and job, the ids of that job already written, and the shards so far.

    skipped, replaced: `Damage` of all jobs begun
    """

    part: int = 0
    job: int = 0
    ids: int = 0
    skipped: int = 0
    replaced: int = 0
    shards: list[dict] = field(default_factory=list)  # {"split", "name", "tokens", "sha256"}

    def tokens(self, split: str) -> int:
        return sum(shard["tokens"] for shard in self.shards if shard["split"] == split)


def build(
    recipe: str,
    parts: Sequence[Part],
    out_dir: str | Path,
    tokenizer: Encoder,
    settings: Settings,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Writes the shards of `parts`, meta.json and SHA256SUMS into `out_dir`; returns the content of meta.json.

    recipe: its name, recorded in meta.json
    tokenizer: a `handgrad.tokenizers.Tokenizer`; ids are uint16 if its vocabulary fits, else uint32
    progress: called with (bytes of the source read, bytes of the source, tokens written)

    The folder changes only when everything is written; then it holds these shards and no older ones.
    Raises HandgradError if the source has no parts or lacks something, if a split gets no tokens, if the disk is full,
    and if the folder holds shards of another source or tokenizer without `replace`.
    """
    if not parts:
        raise HandgradError("data", f"{recipe} comes from at least one file", "none")
    if settings.shard_tokens < 1:
        raise HandgradError("data", "shard_tokens must be at least 1", settings.shard_tokens)
    if settings.workers < 1:
        raise HandgradError("data", "workers must be at least 1", settings.workers)
    out_dir = Path(out_dir)
    try:
        with claimed(out_dir) as building:
            spec = tokenizer.save(building)
            chosen = [settings.shard_tokens, settings.val_tokens, settings.about, settings.special]
            chosen += [settings.on_error, settings.source]
            plan = _fingerprint([recipe, spec, *chosen], parts, building)
            if not settings.replace:
                check_replaces(out_dir, _origin(recipe, parts, spec))
            done = _resumed(building, out_dir, plan)
            _write(parts, building, tokenizer, settings, plan, done, progress)
            special = {"special_tokens": True} if settings.special else {}
            meta = _meta(recipe, parts, tokenizer, spec, done) | special | settings.about
            _check_splits(meta, settings, building)
            install(building, out_dir, meta, {shard["name"]: shard["sha256"] for shard in done.shards})
    except OSError as error:
        raise HandgradError("data", f"{out_dir} must be writable", error.strerror) from None
    return meta


def check(folder: str | Path) -> dict[str, int]:
    """Returns {name: bytes} of the files that the folder's SHA256SUMS lists, after verifying each of them.

    Raises HandgradError for the first that is missing or differs, and if the folder has no SHA256SUMS.
    """
    sums = Path(folder) / SUMS
    hint = "handgrad data writes folders with checksums"
    if os.path.exists(sums):
        require_file(sums, str(sums), "data")
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HandgradError("data", f"{sums} must be a readable list of checksums", reason, hint=hint) from None
    sizes = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        path = sums.parent / name
        if not name or not os.path.isfile(path):
            raise HandgradError("data", f"{sums} must list files of its folder", repr(line))
        found = sha256_of(path)
        if found != digest:
            rule = f"{path} must have the sha256 {digest[:12]}... recorded when it was made"
            raise HandgradError("data", rule, f"{found[:12]}...", hint="it was changed or damaged: make it again")
        sizes[name] = path.stat().st_size
    if not sizes:
        raise HandgradError("data", f"{sums} must list files", "none", hint=hint)
    return sizes


@contextmanager
def claimed(out_dir: Path) -> Iterator[Path]:
    """Locks and yields the folder to build in; removes it at the end unless a finished shard can be resumed from."""
    building, is_new = out_dir / ".preparing", not out_dir.exists()
    try:
        make_folder(building)
    except ValueError as error:  # a zero byte in the name
        raise HandgradError("data", f"{out_dir} must be a folder's name", error) from None
    with (building / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HandgradError("data", f"{out_dir} must be prepared by one process", "another at work") from None
        try:
            yield building
        finally:
            if not (building / _PROGRESS).exists():
                shutil.rmtree(building, ignore_errors=True)
                if is_new and not any(out_dir.iterdir()):
                    out_dir.rmdir()


def _fingerprint(words: list, parts: Sequence[Part], building: Path) -> str:
    """Returns a hash of everything that the shards depend on: source, tokenizer, shard sizes."""
    files = {path.name: sha256_of(path) for path in _tokenizer_files(building)}
    plan = [words, files, [[part.name, part.size, part.sha256, part.split] for part in parts]]
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def check_replaces(out_dir: Path, origin: dict) -> None:
    """Raises HandgradError if the folder holds shards of another source or tokenizer."""
    meta = read_meta(out_dir)
    if meta is not None and any(meta.get(key) != value for key, value in origin.items()):
        got = f"{sum(meta[split].get('tokens', 0) for split in SPLITS):,} tokens of another, or by another tokenizer"
        raise HandgradError(
            "data", f"{out_dir} holds shards of this source", got, hint="use another --out, or --replace"
        )


def _check_splits(meta: dict, settings: Settings, building: Path) -> None:
    """Raises HandgradError if a split has no tokens; nothing is kept to resume from, as it would fail again."""
    wanted = SPLITS if settings.wants_val else ("train",)
    missing = [split for split in wanted if not meta[split]["tokens"]]
    if not missing:
        return
    (building / _PROGRESS).unlink(missing_ok=True)
    hint = f"the first {settings.val_tokens:,} tokens are val" if settings.val_tokens else ""
    hint += f": {settings.val_flag} can be smaller" if hint and settings.val_flag else ""
    got = f"none of {sum(meta[split]['tokens'] for split in SPLITS):,}"
    raise HandgradError("data", f"the {missing[0]} part of the text must hold tokens", got, hint=hint)


def _origin(recipe: str, parts: Sequence[Part], spec: dict) -> dict:
    """Returns what meta.json says of tokenizer and source; it depends on the files' contents, not on their folder."""
    source: dict[str, str | int] = {"recipe": recipe, "files": len(parts), "first": parts[0].name}
    if sums := "".join(part.sha256 for part in parts):  # else the first name contains the revision of all
        source["sha256"] = hashlib.sha256(sums.encode()).hexdigest()
    return {"tokenizer": spec, "source": source}


def _resumed(building: Path, out_dir: Path, plan: str) -> _Done:
    """Returns the progress of an earlier run with the same plan; removes the files of any other."""
    try:
        saved = read_object(building / _PROGRESS, "data", most=2**26)
        done = _Done(**saved["done"])
        counts = (done.part, done.job, done.ids, done.skipped, done.replaced)
        fits = saved["plan"] == plan and all(type(count) is int and 0 <= count <= I64_MAX for count in counts)
        fits = fits and all(_is_intact(building, out_dir, **shard) for shard in done.shards)
    except (HandgradError, OSError, KeyError, TypeError):
        fits = False
    if fits:
        return done
    for path in [building / _PROGRESS, *building.glob("*.bin"), *building.glob(".*.tmp-*")]:
        path.unlink(missing_ok=True)
    return _Done()


def _is_intact(building: Path, out_dir: Path, split: str, name: str, tokens: int, sha256: str) -> bool:
    if (building / name).exists():
        return open_shard(building / name).count == tokens
    moved = out_dir / name  # the earlier run was killed after moving it
    return moved.is_file() and open_shard(moved).count == tokens and sha256_of(moved) == sha256


def _write(
    parts: Sequence[Part],
    building: Path,
    tokenizer: Encoder,
    settings: Settings,
    plan: str,
    done: _Done,
    progress: Progress,
) -> None:
    """Writes the shards that `done` lacks, and records `done` after each."""
    dtype = id_dtype(tokenizer.vocab_size)
    seen = [Damage(done.skipped, done.replaced)]
    pieces = _pieces(parts, tokenizer, settings, done, seen, progress)
    for (split, index), group in groupby(pieces, lambda piece: piece[0]):
        name = f"{split}_{index:06d}.bin"
        places: list[_Place] = []
        shard = write_shard(building / name, _tracked(group, places), dtype)
        sha256 = sha256_of(shard.path)
        done.shards.append({"split": split, "name": name, "tokens": shard.count, "sha256": sha256})
        done.part, done.job, done.ids, damage = places[-1]
        done.skipped, done.replaced = damage.skipped, damage.replaced
        write_whole(building / _PROGRESS, [json.dumps({"plan": plan, "done": asdict(done)}).encode()])
    done.skipped, done.replaced = seen[0].skipped, seen[0].replaced  # also of jobs at the end without an id


def _tracked(group: Iterable[_Piece], places: list[_Place]) -> Iterator[np.ndarray]:
    """Yields the ids of a group of pieces; `places` holds the place after the last one yielded."""
    for _, ids, place in group:
        places[:] = [place]
        yield ids


def _pieces(
    parts: Sequence[Part], tokenizer: Encoder, settings: Settings, done: _Done, seen: list[Damage], progress: Progress
) -> Iterator[_Piece]:
    """Yields the ids after `done` in pieces that do not cross shards. seen: the damage so far, which it adds to."""
    sizes = list(accumulate((part.size for part in parts), initial=0))
    counts = {split: done.tokens(split) for split in SPLITS}
    skip, full = done.ids, settings.shard_tokens
    jobs = _jobs(parts, done.part, done.job)
    for (index, number, read), found in tokenize(jobs, tokenizer, settings.workers, settings.special):
        at, ids = skip, found.ids
        seen[0] += Damage() if skip else found.damage  # a job that was begun is counted
        skip = 0
        while at < len(ids):
            split = parts[index].split or ("val" if counts["val"] < settings.val_tokens else "train")
            left = full - counts[split] % full
            if split == "val" and not parts[index].split:
                left = min(left, settings.val_tokens - counts["val"])
            piece = ids[at : at + left]
            shard = counts[split] // full
            counts[split] += len(piece)
            at += len(piece)
            yield (split, shard), piece, (index, number, at, seen[0])
        progress(sizes[index] + read, sizes[-1], sum(counts.values()))


def _jobs(parts: Sequence[Part], part: int, job: int) -> Iterator[tuple[tuple[int, int, int], Job]]:
    for index in range(part, len(parts)):
        for number, (read, task) in enumerate(parts[index].jobs(parts[index].get())):
            if (index, number) >= (part, job):
                yield (index, number, read), task


def _meta(recipe: str, parts: Sequence[Part], tokenizer: Encoder, spec: dict, done: _Done) -> dict:
    meta = {
        **_origin(recipe, parts, spec),
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size).name,
    }
    for split in SPLITS:
        meta[split] = {"tokens": done.tokens(split)}
        if all(part.split for part in parts):
            meta[split]["bytes"] = sum(part.size for part in parts if part.split == split)
        meta[split]["shards"] = [shard["name"] for shard in done.shards if shard["split"] == split]
    return meta | {name: count for name in ("skipped", "replaced") if (count := getattr(done, name))}


def install(building: Path, out_dir: Path, meta: dict, sums: dict[str, str]) -> None:
    """Moves the new files over the old. meta.json is removed first and moved last, so it never describes a mixture.

    sums: the checksums of the new files; those of meta.json and of the tokenizer are added
    """
    write_text(building / META, json.dumps(meta, indent=2) + "\n")
    for path in [*_tokenizer_files(building), building / META]:
        sums[path.name] = sha256_of(path)
    (out_dir / META).unlink(missing_ok=True)
    flush(out_dir)
    for old in out_dir.iterdir():
        if _SHARD_NAME.fullmatch(old.name) and old.name not in sums:
            old.unlink()
    write_sums(building, out_dir, sums)
    for name in [SUMS, *sums]:  # meta.json is last
        if name == "meta.json":
            flush(out_dir)  # a power cut must not keep its name alone
        if (building / name).exists():  # else an earlier run moved it before it was killed
            (building / name).replace(out_dir / name)
    flush(out_dir)
    (building / _PROGRESS).unlink(missing_ok=True)


def write_sums(into: Path, folder: Path, sums: dict[str, str]) -> None:
    """Writes SHA256SUMS for `sha256sum -c`: the entries that `folder` has for its other files, then `sums`."""
    old = folder / SUMS
    lines = old.read_text(encoding="utf-8", errors="replace").splitlines() if old.is_file() else []
    kept = [line for line in lines if (name := line[66:]) not in sums and (folder / name).is_file()]
    write_whole(into / SUMS, [f"{line}\n".encode() for line in [*kept, *(f"{sums[name]}  {name}" for name in sums)]])


def _tokenizer_files(building: Path) -> list[Path]:
    return sorted(path for path in building.glob("*.json") if path.name not in (_PROGRESS, META))
