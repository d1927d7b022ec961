"""handgrad data RECIPE: turns text into token shards, questions into evaluation files; checks what was made."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from handgrad import data, tokenizers
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError

USAGE = "handgrad data RECIPE [FILE...] [flags]"


@dataclass(frozen=True)
class Making:
    """Which tokenizer, where to, how."""

    out: str = ""
    """folder for train_*.bin, val_*.bin, meta.json and SHA256SUMS; empty: one of its own name"""
    tokenizer: str = "gpt2"
    """gpt2, chars (one id a character; for text and shakespeare), or the path of a tokenizer.json"""
    shard_tokens: int = 100_000_000
    """tokens in one shard"""
    workers: int = 0
    """processes that tokenize; 0: the number of cores, fewer for a small source"""
    replace: bool = False
    """the folder's shards of another source or tokenizer may go"""


@dataclass(frozen=True)
class DataSet(Making):
    """A data set that has a name."""

    source: str = ""
    """its file or folder, as its publishers lay it out; empty: downloaded (shakespeare: in the package)"""


@dataclass(frozen=True)
class FineWeb(DataSet):
    """Pages of the web."""

    sample: Literal["10B", "100B", "350B"] = "10B"
    """tokens in the sample"""


@dataclass(frozen=True)
class Text(Making):
    """UTF-8 text files, a document each."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """the files"""
    val_fraction: float = 0.1
    """part of the text, at its end, that becomes the validation set"""


@dataclass(frozen=True)
class Rows(Making):
    """Files with a document in each row."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """the files; JSON lines may be .gz, .xz or .bz2"""
    column: str = "text"
    """name of the rows' text"""
    val_tokens: int = 2**20
    """the first so many tokens become the validation set; 0: none"""


@dataclass(frozen=True)
class Questions:
    """A multiple-choice benchmark."""

    source: str = ""
    """its file or folder, as its publishers lay it out; empty: downloaded"""
    out: str = ""
    """folder for the evaluation file; empty: named after the benchmark"""
    tokenizer: str = "gpt2"
    """gpt2, or the path of a tokenizer.json of at most 65,536 tokens"""


RECIPES = {  # word: (flags, folder, what it is)
    "shakespeare": (DataSet, "plays", "nine plays, from the package, or a text like them"),
    "tinystories": (DataSet, "tinystories", "short stories in simple English, 0.9 billion tokens"),
    "fineweb": (FineWeb, "fineweb", "cleaned web pages, a sample of 10, 100 or 350 billion tokens"),
    "fineweb-edu": (FineWeb, "edu_fineweb", "the educational ones among them"),
    "openwebtext": (DataSet, "openwebtext", "pages that people linked to, 9 billion tokens"),
    "jsonl": (Rows, "data", "JSON lines"),
    "parquet": (Rows, "data", "Parquet tables"),
    "text": (Text, "data", "text files"),
    "hellaswag": (Questions, "hellaswag", "questions: how a story goes on, 10,042 of them"),
    "mmlu": (Questions, "mmlu", "questions: exams of 57 subjects, 14,042 of them"),
}


def usage() -> str:
    """The recipes, a line each."""
    lines = "\n".join(f"  {word:12} {text}" for word, (_, _, text) in RECIPES.items())
    check = "  check        FOLDER: its files against the checksums noted when they were made"
    return f"usage: {USAGE}\n\n{lines}\n{check}\n\nflags of a recipe: handgrad data RECIPE --help"


def main(argv: list[str]) -> int:
    """Runs the recipe that the first word names."""
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    if word in ("-h", "--help"):
        print(usage())
    elif word == "check":
        check(rest)
    elif word not in RECIPES:
        rule = f"the recipe is one of {', '.join([*RECIPES, 'check'])}"
        raise HandgradError("data", rule, f"'{word}'" if word else "nothing", hint=USAGE)
    elif RECIPES[word][0] is Questions:
        a = parse(Questions, rest, f"data {word}")
        path, count = data.prepare_questions(word, a.out or RECIPES[word][1], tokenizer_of(a.tokenizer), a.source)
        print(f"{path}: {count:,} questions; handgrad eval RUN --tasks {word}={path}")
    else:
        make(word, rest)
    return 0


def make(recipe: str, argv: list[str]) -> None:
    """Makes a data set, with a bar on a terminal, and says what came of it."""
    kind, folder, _ = RECIPES[recipe]
    a = asdict(parse(kind, argv, f"data {recipe}"))
    if a.get("files") == ():
        raise HandgradError(
            "data", f"{recipe} comes from at least one file", "none", hint=f"handgrad data {recipe} FILE..."
        )
    out = a.pop("out") or folder + a.get("sample", "")
    texts = a.get("files") or [a.get("source") or data.shakespeare()]
    if a["tokenizer"] == "chars" and recipe not in ("text", "shakespeare"):
        raise HandgradError("data", "chars tokenizes text and shakespeare", recipe, hint="--tokenizer gpt2")
    tokenizer = tokenizer_of(a.pop("tokenizer"), texts)
    with bar() as progress:
        meta = data.prepare(recipe, out, tokenizer, progress=progress, **a)
    for split in ("train", "val"):
        print(f"{split:6} {meta[split]['tokens']:>13,} tokens in {len(meta[split]['shards'])} shards")
    print(f"vocabulary {meta['vocab_size']:,}; train on it: handgrad train --data.train {out}")


class bar:
    """A progress bar on standard error while the block runs, nothing where that is no terminal."""

    def __enter__(self) -> Callable[[int, int, int], None]:
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]:,} tokens")
        console = Console(stderr=True)
        self.live = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.live.start()
        task = self.live.add_task("", tokens=0)
        return lambda read, size, tokens: self.live.update(task, completed=read, total=size, tokens=tokens)

    def __exit__(self, kind, error, trace) -> None:
        self.live.stop()
        if kind is KeyboardInterrupt:
            print("what shards were finished are kept; the same command goes on after them", file=sys.stderr)


def tokenizer_of(word: str, texts=()) -> tokenizers.Tokenizer:
    """The tokenizer that a flag names."""
    if word == "gpt2":
        return tokenizers.gpt2()
    return tokenizers.chars(data.read_text(texts)) if word == "chars" else tokenizers.from_file(word)


def check(argv: list[str]) -> None:
    """Compares a folder with its checksums."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise HandgradError("data", "after check comes a folder", f"'{' '.join(argv)}'" if argv else "nothing")
    sizes = data.check(Path(argv[0]))
    print(f"{argv[0]}: {len(sizes)} files, {sum(sizes.values()):,} bytes, all as they were made")
