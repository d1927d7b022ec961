"""The data sets: where each is published, how it is split and ordered. Splits and orders are llm.c's.

shakespeare: a blank line ends a document; the first 32,768 tokens are val. The default source is the packaged text.
tinystories: the first file is val; random.Random(1337 + index of the file in its split) shuffles each file's stories.
fineweb, fineweb-edu, openwebtext: in the order of file names; the first shard is val.
jsonl, json, parquet, tokens: in the order given; the first val_tokens tokens are val.
text: the last val_fraction of the bytes is val.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as renamed
from functools import partial
from pathlib import Path

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.limits import cpus
from handgrad.data.prepare.bounds import Unfolding, most_unfolded, readable, too_large
from handgrad.data.prepare.build import Jobs, Part, Progress, Settings, build
from handgrad.data.prepare.hub import hub_files, hub_parts, local, local_part
from handgrad.data.prepare.ids import token_ids
from handgrad.data.prepare.readers import archive, json_lines, json_list, statements, stories, table, texts
from handgrad.data.prepare.text import paths_of, shakespeare, text_parts, unfolded
from handgrad.data.prepare.workers import Encoder, Job

OWN = ("text", "jsonl", "json", "parquet", "tokens")
RECIPES = ("shakespeare", "tinystories", "fineweb", "fineweb-edu", "openwebtext", *OWN)
ON_ERROR = ("stop", "skip", "replace")
FINEWEB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
_SHAKESPEARE_VAL = 32_768
_OWN_VAL = 2**20
_ROWS: dict[str, Callable[..., Iterator[tuple[int, Job]]]] = {"jsonl": json_lines, "json": json_list, "parquet": table}
_SEED = 1337
WORKER_BYTES = 2**24  # of source per worker; a smaller source is done before another process has started


def prepare(
    recipe: str,
    out_dir: str | Path,
    tokenizer: Encoder,
    *,
    source: str | Path | None = None,
    files: str | Path | Sequence[str | Path] = (),
    val: str | Path | Sequence[str | Path] = (),
    sample: str = "10B",
    column: str = "text",
    raw: str | None = None,
    val_tokens: int | None = None,
    val_fraction: float | None = None,
    on_error: str = "stop",
    special_tokens: bool = False,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    replace: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Builds the data set `recipe` in `out_dir` (see `build`) and returns the content of meta.json.

    source: the data set's file or folder as published; None downloads it
    files, val: the input of `OWN`, one path or several; val are the validation set, and `files` then all train
    sample: "10B", "100B" or "350B" tokens of FineWeb
    column: the text column of jsonl, json and parquet;  raw: the dtype of ids without a header, "uint16" or "uint32"
    val_tokens: the first tokens of jsonl, json, parquet and tokens, which become val; None: 2**20
    val_fraction: share of the bytes of text, at the end, that becomes val; None: 0.1
    on_error: what becomes of damaged rows of `OWN`: "stop", "skip" or "replace" (see `json_lines`, `text_parts`)
    special_tokens: special tokens spelled out in a text are these tokens; else they are plain text
    workers: processes; 0 for one per core, or fewer if the source is small
    replace: the folder's shards of another source or tokenizer are replaced

    Raises HandgradError for a source that is missing or damaged, and as `build` does.
    """
    _check(recipe, tokenizer, val, val_tokens, on_error, special_tokens)
    fraction = share_of_val(val, val_fraction, 0.1)
    own = Own(column, raw, tokenizer.vocab_size, on_error, Path(out_dir) / ".preparing")
    parts = _parts(recipe, source, own, paths_of(files), sample, fraction)
    if val:
        held = _parts(recipe, source, own, paths_of(val), sample, 0, "val")
        parts = [renamed(part, split="train") for part in parts] + [renamed(part, split="val") for part in held]
    first, wants_val, flag = _first_tokens(recipe, val_tokens, shard_tokens, fraction, bool(val))
    size = sum(part.size for part in parts)
    workers = workers or min(cpus(), 1 + size // WORKER_BYTES)
    settings = Settings(
        shard_tokens,
        first,
        wants_val,
        workers,
        replace,
        flag,
        special=special_tokens,
        on_error=on_error,
        source=(column, raw),
    )
    return build(recipe, parts, out_dir, tokenizer, settings, progress)


def share_of_val(val: object, val_fraction: float | None, usual: float) -> float:
    """Returns the share of a source that becomes val: `usual` for None, 0 if files do.

    Raises HandgradError for a share out of range, and for one beside files.
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
    if val and val_fraction:
        raise _is_val_twice("--val-fraction")
    return 0.0 if val else usual if val_fraction is None else val_fraction


def _is_val_twice(flag: str) -> HandgradError:
    return HandgradError("data", "with --val the validation set is its files", flag, hint="leave one of them out")


def check_on_error(on_error: str, words: Sequence[str] = ON_ERROR) -> None:
    """Raises HandgradError unless it is one of the words."""
    if on_error not in words:
        raise HandgradError("data", f"on_error is one of {', '.join(words)}", repr(on_error))


def _check(
    recipe: str, tokenizer: Encoder, val: object, val_tokens: int | None, on_error: str, special_tokens: bool
) -> None:
    """Raises HandgradError for options out of range, or that the recipe does not have."""
    if val_tokens is not None and val_tokens < 0:
        raise HandgradError("data", "val_tokens must be at least 0", val_tokens)
    check_on_error(on_error)
    if recipe not in OWN and (val or on_error != "stop"):
        raise HandgradError("data", f"val and on_error are for {', '.join(OWN)}", f"'{recipe}'")
    if recipe == "tokens" and (on_error != "stop" or special_tokens):
        raise HandgradError("data", "on_error and special_tokens are for text", "'tokens', whose files hold ids")
    if val and val_tokens:
        raise _is_val_twice("--val-tokens")
    if special_tokens and not tokenizer.specials:
        rule = "--special-tokens is for a tokenizer with special tokens"
        raise HandgradError("data", rule, tokenizer.name)


def _first_tokens(
    recipe: str, val_tokens: int | None, shard_tokens: int, fraction: float, has_val: bool
) -> tuple[int, bool, str]:
    """Returns (how many first tokens are val, whether there must be some, the flag that says how many)."""
    if has_val:
        return 0, True, ""
    if recipe == "text":
        return 0, fraction > 0, ""
    if recipe == "tinystories":
        return 0, True, ""
    if recipe == "shakespeare":
        return _SHAKESPEARE_VAL, True, ""
    if recipe in OWN:
        first = _OWN_VAL if val_tokens is None else val_tokens
        return first, first > 0, "--val-tokens"
    return shard_tokens, True, "--shard-tokens"


def prepare_text(
    files: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: Encoder,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    replace: bool = False,
) -> dict:
    """Writes train_000000.bin.., val_000000.bin.. and meta.json of `files` into `out_dir`; returns meta.json's content.

    `files` is one path or several. Each is a document; as in llm.c's shards, the tokenizer's end-of-text id precedes
    it, if there is one.

    tokenizer: a `handgrad.tokenizers.Tokenizer`; ids are uint16 if its vocabulary fits, else uint32
    val_fraction: share of the text's bytes, at the end, that becomes val; 0 writes no val shard
    shard_tokens: tokens in a full shard
    workers: processes that tokenize; with more than one, the calling script needs an `if __name__ == "__main__"` guard
    replace: the folder's shards of another source or tokenizer are replaced

    The folder changes only when everything is written; then it holds these shards and no older ones. Calling it again
    after a run was killed continues that run.
    Raises HandgradError for a file that is missing or not UTF-8, for a split without text, for a full disk.

    >>> import tempfile
    >>> from handgrad import tokenizers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = Path(folder, "a.txt")
    ...     _ = text.write_text("to be or not to be")
    ...     meta = prepare_text(text, folder, tokenizers.chars(text.read_text()), val_fraction=0.5)
    ...     meta["vocab_size"], meta["train"]
    (7, {'tokens': 9, 'bytes': 9, 'shards': ['train_000000.bin']})
    """
    return prepare(
        "text",
        out_dir,
        tokenizer,
        files=files,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        workers=workers,
        replace=replace,
    )


@dataclass(frozen=True)
class Own:
    """How files of one's own are read. building: the folder that compressed texts are unfolded in"""

    column: str
    raw: str | None
    vocab_size: int
    on_error: str
    building: Path


def _parts(
    recipe: str,
    source: str | Path | None,
    own: Own,
    files: Sequence[Path],
    sample: str,
    val_fraction: float,
    split: str = "source",
) -> list[Part]:
    """Returns the source of `recipe`. split: the folder that it is unfolded in, if it must be"""
    if recipe == "shakespeare":
        return [local_part(Path(source or shakespeare()), statements)]
    if recipe == "tinystories":
        return _tinystories(source, own.building)
    if recipe in FINEWEB:
        jobs = partial(table, parser=texts("text"))
        return _published(source, FINEWEB[recipe], (f"sample/{sample}T/*.parquet",), ("*.parquet",), jobs)
    if recipe == "openwebtext":
        patterns, also = ("plain_text/*.parquet", "subsets/*.tar"), ("*.parquet", "*.tar", "*.xz")
        return _published(source, "Skylion007/openwebtext", patterns, also, _openwebtext)
    if recipe in _ROWS:
        rows = partial(_ROWS[recipe], parser=texts(own.column, own.on_error, bare=recipe == "json"))
        return [local_part(file, rows) for file in files]
    if recipe == "tokens":
        ids = partial(token_ids, raw=own.raw, vocab_size=own.vocab_size)
        return [local_part(file, ids) for file in files]
    if recipe == "text":
        return text_parts(unfolded(files, own.building / split), val_fraction, own.on_error)
    raise HandgradError("data", f"the recipe is one of {', '.join(RECIPES)}", f"'{recipe}'")


def _published(
    source: str | Path | None, repo: str, published: tuple[str, ...], also: tuple[str, ...], jobs: Jobs
) -> list[Part]:
    """Returns the files of a data set: local ones that match `published` or `also`, without a source the hub's."""
    if source:
        return [local_part(path, jobs) for path in local(source, published + also)]
    return hub_parts(repo, published, jobs)


def _openwebtext(path: Path) -> Iterator[tuple[int, Job]]:
    return table(path, texts("text")) if path.suffix == ".parquet" else archive(path)


def _tinystories(source: str | Path | None, building: Path) -> list[Part]:
    packed = "TinyStories_all_data.tar.gz"
    if source:
        files = local(source, ("*.json", "TinyStories_all_data/*.json", packed))
    else:
        files = hub_files("roneneldan/TinyStories", (packed,))
    if files[0].suffix != ".json":
        files = _unpacked(files[0], building / "source")
    if len(files) < 2:
        raise HandgradError("data", "TinyStories must have two files or more: the first is val", len(files))
    val, *train = files
    parts = [local_part(val, partial(stories, seed=_SEED), "val")]
    return parts + [local_part(path, partial(stories, seed=_SEED + index), "train") for index, path in enumerate(train)]


def _unpacked(archive: Path, folder: Path) -> list[Path]:
    """Returns the .json files of a tar archive, extracted into `folder` unless they are there already."""
    files, size = [], require_file(archive, "an archive", "data")
    with readable(archive), archive.open("rb") as raw:
        members = Unfolding(archive, raw, size, archive.suffix).tar()
        folder.mkdir(parents=True, exist_ok=True)
        for member in members:
            path = folder / Path(member.name).name
            packed = members.extractfile(member) if member.isfile() and path.suffix == ".json" else None
            if packed is None:
                continue
            if member.size > most_unfolded(size):  # a sparse file takes no bytes in the archive
                raise too_large(archive, most_unfolded(size))
            files.append(path)
            if not (path.is_file() and path.stat().st_size == member.size):
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                temporary.replace(path)
    return sorted(files)
