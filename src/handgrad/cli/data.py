"""handgrad data RECIPE: writes token shards from text and evaluation files from questions; verifies checksums."""

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from handgrad import data
from handgrad.cli.data_finetune import Chats, Labelled, make_chat, make_labels
from handgrad.cli.data_shards import Shards, bar
from handgrad.cli.data_tokenizer import Files, MoreFiles, Training, tokenizer_of, train_tokenizer
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.models import preset

USAGE = "handgrad data RECIPE [FILE...] [flags]"


@dataclass(frozen=True)
class DataSet(Shards):
    """A published data set."""

    source: str = ""
    """its file or folder as published; empty: download it (shakespeare: use the packaged text)"""


@dataclass(frozen=True)
class FineWeb(DataSet):
    """Web pages."""

    sample: Literal["10B", "100B", "350B"] = "10B"
    """tokens in the sample"""


OnError = Literal["stop", "skip", "replace"]


@dataclass(frozen=True)
class Text(Shards):
    """UTF-8 text files, one document each."""

    files: Files = ()
    """the files; plain, .gz, .xz, .bz2 or .zst"""
    val: MoreFiles = ()
    """files that become the validation set, whole"""
    val_fraction: float | None = None
    """share of the text, at its end, that becomes the validation set; None: 0.1, without --val"""
    on_error: OnError = "stop"
    """bytes that are no UTF-8 stop it, or their lines are skipped, or U+FFFD replaces them; what was done is counted"""


@dataclass(frozen=True)
class Rows(Shards):
    """Files with one document per row."""

    files: Files = ()
    """the files; JSON may be .gz, .xz, .bz2 or .zst"""
    column: str = "text"
    """the column that holds the text"""
    val: MoreFiles = ()
    """files that become the validation set, whole"""
    val_tokens: int | None = None
    """tokens, from the start, that become the validation set; 0: none; None: 1,048,576, without --val"""
    on_error: OnError = "stop"
    """a row without text stops it, or is skipped and counted; replace: so, once bytes that are no UTF-8 are U+FFFD"""


@dataclass(frozen=True)
class Ids:
    """Files of token ids: .npy, or ids alone, as nanoGPT's train.bin."""

    files: Files = ()
    """the files"""
    raw: Literal["uint16", "uint32"] | None = None
    """dtype of the ids in files without a header, little-endian; None: the files have one"""
    out: str = ""
    """folder for train_*.bin, val_*.bin, meta.json and SHA256SUMS; empty: data"""
    tokenizer: str = "gpt2"
    """the tokenizer that made the ids: gpt2, a tokenizer.json, or a folder that holds one"""
    val: MoreFiles = ()
    """files that become the validation set, whole"""
    val_tokens: int | None = None
    """ids, from the start, that become the validation set; 0: none; None: 1,048,576, without --val"""
    shard_tokens: int = 100_000_000
    """tokens in a full shard"""
    replace: bool = False
    """replace shards of another source or tokenizer in the folder"""


@dataclass(frozen=True)
class Questions:
    """A multiple-choice benchmark."""

    source: str = ""
    """its file or folder as published; empty: download it"""
    out: str = ""
    """folder for the evaluation file; empty: named after the benchmark"""
    tokenizer: str = "gpt2"
    """gpt2, or a tokenizer.json of at most 65,536 tokens, or a folder that holds one"""


RECIPES: dict[str, tuple[type, str, str]] = {  # word: (dataclass of its flags, default folder, description)
    "shakespeare": (DataSet, "plays", "nine plays, from the package or another text"),
    "tinystories": (DataSet, "tinystories", "short stories in simple English, 0.9 billion tokens"),
    "fineweb": (FineWeb, "fineweb", "filtered web pages, a sample of 10, 100 or 350 billion tokens"),
    "fineweb-edu": (FineWeb, "edu_fineweb", "educational web pages, a sample of the same sizes"),
    "openwebtext": (DataSet, "openwebtext", "web pages linked from Reddit, 9 billion tokens"),
    "jsonl": (Rows, "data", "JSON lines"),
    "json": (Rows, "data", "JSON lists of texts or objects"),
    "parquet": (Rows, "data", "Parquet tables"),
    "text": (Text, "data", "text files"),
    "labels": (Labelled, "data", "texts and their labels, for a BERT that classifies"),
    "chat": (Chats, "chat", "chats, for fine-tuning"),
    "tokens": (Ids, "data", "files of token ids: .npy, or nanoGPT's train.bin"),
    "tokenizer": (
        Training,
        "tokenizer",
        "trains a byte-level BPE tokenizer on text files, or adds special tokens to one",
    ),
    "hellaswag": (Questions, "hellaswag", "10,042 questions: choose the ending of a story"),
    "mmlu": (Questions, "mmlu", "14,042 questions: exams in 57 subjects"),
}


def usage() -> str:
    """Returns the help text: one line per recipe."""
    lines = "\n".join(f"  {word:12} {text}" for word, (_, _, text) in RECIPES.items())
    check = "  check        FOLDER: verify its files against SHA256SUMS"
    return f"usage: {USAGE}\n\n{lines}\n{check}\n\nflags of a recipe: handgrad data RECIPE --help"


def main(argv: list[str]) -> int:
    """Runs the recipe `argv[0]` with the flags in the rest."""
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    if word in ("-h", "--help", "help") or (word == "check" and rest in (["-h"], ["--help"])):
        print(usage())
    elif word == "check":
        check(rest)
    elif word not in RECIPES:
        rule = f"the recipe is one of {', '.join([*RECIPES, 'check'])}"
        raise HandgradError(
            "data", rule, f"'{word}'" if word else "nothing", hint=did_you_mean(word, [*RECIPES, "check"]) or USAGE
        )
    elif RECIPES[word][0] is Questions:
        a = parse(Questions, rest, f"data {word}")
        path, count = data.prepare_questions(word, a.out or RECIPES[word][1], tokenizer_of(a.tokenizer), a.source)
        print(f"{path}: {count:,} questions; evaluate on them: handgrad eval RUN --tasks {quote(f'{word}={path}')}")
    elif RECIPES[word][0] is Labelled:
        make_labels(parse(Labelled, rest, f"data {word}"), RECIPES[word][1])
    elif RECIPES[word][0] is Chats:
        make_chat(parse(Chats, rest, "data chat"))
    elif RECIPES[word][0] is Training:
        train_tokenizer(parse(Training, rest, "data tokenizer"), RECIPES[word][1])
    else:
        make(word, rest)
    return 0


def make(recipe: str, argv: list[str]) -> None:
    """Builds a data set, with a progress bar on a terminal, and prints its size."""
    kind, folder, _ = RECIPES[recipe]
    a = asdict(parse(kind, argv, f"data {recipe}"))
    if a.get("files") == ():
        hint = f"handgrad data {recipe} FILE..."
        raise HandgradError("data", f"{recipe} comes from at least one file", "none", hint=hint)
    out = a.pop("out") or folder + a.get("sample", "")
    texts = [*a["files"], *a["val"]] if "files" in a else [a.get("source") or data.shakespeare()]
    if a["tokenizer"] == "chars" and recipe not in ("text", "shakespeare"):
        raise HandgradError("data", "--tokenizer chars is for text and shakespeare", recipe, hint="--tokenizer gpt2")
    tokenizer = tokenizer_of(a.pop("tokenizer"), texts)
    with bar() as progress:
        meta = data.prepare(recipe, out, tokenizer, progress=progress, **a)
    for split in ("train", "val"):
        count = len(meta[split]["shards"])
        print(f"{split:6} {meta[split]['tokens']:>13,} tokens in {count} shard{'s' * (count != 1)}")
    if "replaced" in meta:
        bad = "bytes that are no UTF-8, and lone" if a.get("on_error") == "replace" else "lone"
        print(f"{bad} surrogates in the text, now U+FFFD: {meta['replaced']:,}")
    if "skipped" in meta:
        print(
            f"{'lines that are no UTF-8' if recipe == 'text' else 'rows without text'}, left out: {meta['skipped']:,}"
        )
    least = min([a["shard_tokens"], *(meta[split]["tokens"] for split in ("train", "val") if meta[split]["shards"])])
    wanted = preset("tiny").max_seq_len + 1
    if least < wanted:
        print(f"a sequence of handgrad train takes {wanted} tokens, and the smaller part has {least}: add text")
    if least > 1:
        shorter = f" --seq-len {least - 1}" * (least < wanted)
        print(f"vocabulary {meta['vocab_size']:,}; train on it: handgrad train --train {quote(out)}{shorter}")


def check(argv: list[str]) -> None:
    """Verifies a folder against its checksums."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise HandgradError("data", "after check comes a folder", f"'{' '.join(argv)}'" if argv else "nothing")
    sizes = data.check(Path(argv[0]))
    print(f"{argv[0]}: {len(sizes)} files, {sum(sizes.values()):,} bytes, all as they were made")
