"""The data sets that people train on: where they come from, how they are split and ordered. Facts are llm.c's.

shakespeare: a document ends at a blank line; the first 32,768 tokens are val. Without a source, the packaged text.
tinystories: the first file is val; each file is shuffled by Python's generator with seed 1337 + its place in its split.
fineweb, fineweb-edu, openwebtext, in the order of file names: the first shard is val.
jsonl, parquet: the same with a smaller val.
"""

import os
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from handgrad.core.errors import HandgradError
from handgrad.data.prepare.build import Part, Settings, build
from handgrad.data.prepare.hub import hub_parts, local, local_part
from handgrad.data.prepare.readers import archive, json_lines, readable, statements, stories, table
from handgrad.data.prepare.text import shakespeare, text_parts

RECIPES = ("shakespeare", "tinystories", "fineweb", "fineweb-edu", "openwebtext", "jsonl", "parquet", "text")
FINEWEB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
_SHAKESPEARE_VAL = 32_768
_SEED = 1337
_WORKER_BYTES = 2**24  # of source; less is done before another process has started


def prepare(
    recipe: str,
    out_dir: str | Path,
    tokenizer,
    *,
    source: str | Path | None = None,
    files: Sequence[str | Path] = (),
    sample: str = "10B",
    column: str = "text",
    val_tokens: int = 2**20,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    replace: bool = False,
    progress: Callable[[int, int, int], None] = lambda read, size, tokens: None,
) -> dict:
    """Makes the data set `recipe` in `out_dir`, by `build`, and returns meta.json's content.

    source: the data set's file or folder, as its publishers lay it out; without it, it is downloaded
    files: what jsonl, parquet and text are made from
    sample: "10B", "100B" or "350B" tokens of FineWeb
    column: where rows of jsonl and parquet hold their text;  val_tokens: their first tokens, which become val
    val_fraction: share of the bytes of `text`, at its end, that becomes val
    workers: processes; 0: as many as there are cores, or fewer for a small source
    replace: shards of another source or tokenizer that are in the folder may go

    Raises HandgradError for a source that is missing or damaged, and as `build` does.
    """
    out_dir = Path(out_dir)
    wants_val = True
    if recipe == "shakespeare":
        parts, val_tokens = [local_part(Path(source or shakespeare()), statements)], _SHAKESPEARE_VAL
    elif recipe == "tinystories":
        parts = _tinystories(source, out_dir)
    elif recipe in FINEWEB:
        pattern = f"sample/{sample}T/*.parquet"
        parts = _parts(source, FINEWEB[recipe], (pattern,), ("*.parquet",), partial(table, column="text"))
        val_tokens = shard_tokens
    elif recipe == "openwebtext":
        published = ("plain_text/*.parquet", "subsets/*.tar")
        parts = _parts(source, "Skylion007/openwebtext", published, ("*.parquet", "*.tar", "*.xz"), _openwebtext)
        val_tokens = shard_tokens
    elif recipe in ("jsonl", "parquet"):
        jobs = partial(json_lines if recipe == "jsonl" else table, column=column)
        parts, wants_val = [local_part(Path(file), jobs) for file in files], val_tokens > 0
    elif recipe == "text":
        if not 0 <= val_fraction < 1:
            raise HandgradError("data", "val_fraction must lie in 0..1, 1 excluded", val_fraction)
        parts, wants_val = text_parts(files, val_fraction), val_fraction > 0
    else:
        raise HandgradError("data", f"the recipe is one of {', '.join(RECIPES)}", f"'{recipe}'")
    if all(part.split for part in parts):
        val_tokens = 0
    size = sum(part.size for part in parts)
    workers = workers or min(os.cpu_count(), 1 + size // _WORKER_BYTES)
    val_flag = {"shakespeare": "", "jsonl": "--val-tokens", "parquet": "--val-tokens"}.get(recipe, "--shard-tokens")
    settings = Settings(shard_tokens, val_tokens, wants_val, workers, replace, val_flag)
    return build(recipe, parts, out_dir, tokenizer, settings, progress)


def prepare_text(
    files: Sequence[str | Path],
    out_dir: str | Path,
    tokenizer,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    replace: bool = False,
) -> dict:
    """Writes `files` as train_000000.bin.., val_000000.bin.. and meta.json into `out_dir`; returns meta.json's content.

    Each file is a document, preceded by the tokenizer's end-of-text id where it has one, as in llm.c's shards.

    tokenizer: a `handgrad.tokenizers.Tokenizer`; ids are uint16 if its vocabulary allows, else uint32
    val_fraction: share of the text's bytes, at its end, that becomes val; 0 makes no val shard
    shard_tokens: tokens in a full shard
    workers: processes that tokenize; a script that asks for more than one is imported by them, so guard its main part
    replace: shards of another source or tokenizer that are in the folder may go

    The folder changes only when all is written; then it holds these shards and no older ones of the same names. A run
    that was killed is continued by the next one.
    Raises HandgradError for a file that is missing or not UTF-8, for a split without text, for a full disk.

    >>> import tempfile
    >>> from handgrad import tokenizers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = Path(folder, "a.txt")
    ...     _ = text.write_text("to be or not to be")
    ...     meta = prepare_text([text], folder, tokenizers.chars(text.read_text()), val_fraction=0.5)
    ...     meta["vocab_size"], meta["train"]
    (7, {'tokens': 9, 'bytes': 9, 'shards': ['train_000000.bin']})
    """
    made = {"files": files, "val_fraction": val_fraction, "shard_tokens": shard_tokens, "workers": workers}
    return prepare("text", out_dir, tokenizer, **made, replace=replace)


def _parts(source, repo: str, published: tuple, also: tuple, jobs) -> list[Part]:
    """Returns the files of a data set: local ones in the layout `published` or `also`, else the hub's."""
    if source:
        return [local_part(path, jobs) for path in local(source, published + also)]
    return hub_parts(repo, published, lambda name: jobs)


def _openwebtext(path: Path):
    return table(path, "text") if path.suffix == ".parquet" else archive(path)


def _tinystories(source, out_dir: Path) -> list[Part]:
    packed = "TinyStories_all_data.tar.gz"
    if source:
        files = local(source, ("*.json", "TinyStories_all_data/*.json", packed))
    else:
        files = [hub_parts("roneneldan/TinyStories", (packed,), lambda name: stories)[0].get()]
    if files[0].suffix != ".json":
        files = _unpacked(files[0], out_dir / ".preparing" / "source")
    if len(files) < 2:
        raise HandgradError("data", "TinyStories must have two files or more: the first is val", len(files))
    val, *train = files
    seeded = [(val, "val", _SEED), *((path, "train", _SEED + place) for place, path in enumerate(train))]
    return [local_part(path, partial(stories, seed=seed), split) for path, split, seed in seeded]


def _unpacked(archive: Path, folder: Path) -> list[Path]:
    """Returns the .json files of a tar archive, unpacked into `folder`; those that are there already stay."""
    files = []
    with readable(archive), tarfile.open(archive, "r:*") as members:
        folder.mkdir(parents=True, exist_ok=True)
        for member in members:
            path = folder / Path(member.name).name
            if not (member.isfile() and path.suffix == ".json"):
                continue
            files.append(path)
            if not (path.is_file() and path.stat().st_size == member.size):
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file, members.extractfile(member) as packed:
                    while piece := packed.read(2**20):
                        file.write(piece)
                temporary.replace(path)
    return sorted(files)
