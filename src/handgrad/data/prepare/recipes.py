"""The data sets: where each is published, how it is split and ordered. Splits and orders are llm.c's.

shakespeare: a blank line ends a document; the first 32,768 tokens are val. The default source is the packaged text.
tinystories: the first file is val; random.Random(1337 + index of the file in its split) shuffles each file's stories.
fineweb, fineweb-edu, openwebtext: in the order of file names; the first shard is val.
jsonl, parquet: in the order given; the first val_tokens tokens are val.
text: the last val_fraction of the bytes is val.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from handgrad.core.disk import require_file
from handgrad.core.errors import HandgradError
from handgrad.core.limits import cpus
from handgrad.data.prepare.bounds import Unfolding, most_unfolded, readable, too_large
from handgrad.data.prepare.build import Jobs, Part, Progress, Settings, build
from handgrad.data.prepare.hub import hub_files, hub_parts, local, local_part
from handgrad.data.prepare.readers import archive, json_lines, statements, stories, table
from handgrad.data.prepare.text import paths_of, shakespeare, text_parts
from handgrad.data.prepare.workers import Encoder, Job

RECIPES = ("shakespeare", "tinystories", "fineweb", "fineweb-edu", "openwebtext", "jsonl", "parquet", "text")
FINEWEB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
_SHAKESPEARE_VAL = 32_768
_SEED = 1337
WORKER_BYTES = 2**24  # of source per worker; a smaller source is done before another process has started


def prepare(
    recipe: str,
    out_dir: str | Path,
    tokenizer: Encoder,
    *,
    source: str | Path | None = None,
    files: str | Path | Sequence[str | Path] = (),
    sample: str = "10B",
    column: str = "text",
    val_tokens: int = 2**20,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    replace: bool = False,
    progress: Progress = lambda read, size, tokens: None,
) -> dict:
    """Builds the data set `recipe` in `out_dir` (see `build`) and returns the content of meta.json.

    source: the data set's file or folder as published; None downloads it
    files: the input of jsonl, parquet and text: one path or several
    sample: "10B", "100B" or "350B" tokens of FineWeb
    column: the text column of jsonl and parquet
    val_tokens: the first tokens of jsonl and parquet, which become val
    val_fraction: share of the bytes of text, at the end, that becomes val
    workers: processes; 0 for one per core, or fewer if the source is small
    replace: the folder's shards of another source or tokenizer are replaced

    Raises HandgradError for a source that is missing or damaged, and as `build` does.
    """
    if not 0 <= val_fraction < 1:
        raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
    parts = _parts(recipe, source, paths_of(files), sample, column, val_fraction, Path(out_dir))
    wants_val, val_flag = True, ""
    if recipe == "text":
        val_tokens, wants_val = 0, val_fraction > 0
    elif recipe == "tinystories":
        val_tokens = 0
    elif recipe == "shakespeare":
        val_tokens = _SHAKESPEARE_VAL
    elif recipe in ("jsonl", "parquet"):
        wants_val, val_flag = val_tokens > 0, "--val-tokens"
    else:
        val_tokens, val_flag = shard_tokens, "--shard-tokens"
    size = sum(part.size for part in parts)
    workers = workers or min(cpus(), 1 + size // WORKER_BYTES)
    settings = Settings(shard_tokens, val_tokens, wants_val, workers, replace, val_flag)
    return build(recipe, parts, out_dir, tokenizer, settings, progress)


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


def _parts(
    recipe: str,
    source: str | Path | None,
    files: Sequence[Path],
    sample: str,
    column: str,
    val_fraction: float,
    out_dir: Path,
) -> list[Part]:
    """Returns the source of `recipe`."""
    if recipe == "shakespeare":
        return [local_part(Path(source or shakespeare()), statements)]
    if recipe == "tinystories":
        return _tinystories(source, out_dir)
    if recipe in FINEWEB:
        jobs = partial(table, column="text")
        return _published(source, FINEWEB[recipe], (f"sample/{sample}T/*.parquet",), ("*.parquet",), jobs)
    if recipe == "openwebtext":
        patterns, also = ("plain_text/*.parquet", "subsets/*.tar"), ("*.parquet", "*.tar", "*.xz")
        return _published(source, "Skylion007/openwebtext", patterns, also, _openwebtext)
    if recipe in ("jsonl", "parquet"):
        jobs = partial(json_lines if recipe == "jsonl" else table, column=column)
        return [local_part(file, jobs) for file in files]
    if recipe == "text":
        return text_parts(files, val_fraction)
    raise HandgradError("data", f"the recipe is one of {', '.join(RECIPES)}", f"'{recipe}'")


def _published(
    source: str | Path | None, repo: str, published: tuple[str, ...], also: tuple[str, ...], jobs: Jobs
) -> list[Part]:
    """Returns the files of a data set: local ones that match `published` or `also`, without a source the hub's."""
    if source:
        return [local_part(path, jobs) for path in local(source, published + also)]
    return hub_parts(repo, published, jobs)


def _openwebtext(path: Path) -> Iterator[tuple[int, Job]]:
    return table(path, "text") if path.suffix == ".parquet" else archive(path)


def _tinystories(source: str | Path | None, out_dir: Path) -> list[Part]:
    packed = "TinyStories_all_data.tar.gz"
    if source:
        files = local(source, ("*.json", "TinyStories_all_data/*.json", packed))
    else:
        files = hub_files("roneneldan/TinyStories", (packed,))
    if files[0].suffix != ".json":
        files = _unpacked(files[0], out_dir / ".preparing" / "source")
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
