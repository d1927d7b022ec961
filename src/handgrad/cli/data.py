"""handgrad data RECIPE: writes token shards from text and evaluation files from questions; verifies checksums."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from handgrad import data, tokenizers
from handgrad.cli.data_tokenizer import Files, MoreFiles, Training, tokenizer_of, train_tokenizer
from handgrad.cli.flags import parse
from handgrad.core.errors import HandgradError, did_you_mean
from handgrad.infer.load import open_source
from handgrad.models import preset

USAGE = "handgrad data RECIPE [FILE...] [flags]"


@dataclass(frozen=True)
class Shards:
    """Where to write, with which tokenizer, in how many processes."""

    out: str = ""
    """output folder; empty: plays for shakespeare, data for your own files, else the name of the data set"""
    tokenizer: str = "gpt2"
    """gpt2, chars (an id per character), a tokenizer.json, BERT's vocab.txt, or a folder with one"""
    special_tokens: bool = False
    """a special token spelled out in the text, such as <|endoftext|>, is that token; else it is plain text"""
    shard_tokens: int = 100_000_000
    """tokens in a full shard"""
    workers: int = 0
    """processes that tokenize; 0: one per core, fewer for a small source"""
    replace: bool = False
    """replace shards of another source or tokenizer in the folder"""


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
    raw: Literal["", "uint16", "uint32"] = ""
    """dtype of the ids in files without a header, little-endian"""
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
class Labelled(Shards):
    """Files with one labelled text per row."""

    files: Files = ()
    """JSON lines such as {"text": "Too long.", "label": "bad"}; may be .gz, .xz, .bz2 or .zst"""
    val: str = ""
    """file of the same kind for validation; empty: --val-fraction of the texts"""
    val_fraction: float = 0.1
    """share of the texts that becomes the validation set, without --val"""
    column: str = "text"
    """the column that holds the text"""
    label: str = "label"
    """the column that holds the label, text or a whole number"""
    pair: str = ""
    """the column that holds a second text, for labels of pairs; empty: there is none"""
    regression: bool = False
    """labels are numbers, which the model learns to predict, by their squared error"""
    seq_len: int = 128
    """tokens of a sequence, [CLS] and [SEP] counted; longer texts are cut"""


@dataclass(frozen=True)
class Chats:
    """Chats to fine-tune a model on: JSON lines with messages, or with a prompt and a completion."""

    files: Files = ()
    """the files; JSON lines may be .gz, .xz, .bz2 or .zst"""
    model: str = ""
    """the model that will learn them, a folder or hf:NAME, or its tokenizer.json; gpt2: that tokenizer"""
    template: str = ""
    """chatml, gemma, llama3, mistral, qwen2.5, or a Jinja file; empty: the model's own"""
    out: str = "chat"
    """folder for train_*.bin and .mask, val_*.bin and .mask, meta.json and SHA256SUMS"""
    val_fraction: float = 0.05
    """share of the rows, evenly spread, that becomes the validation set; 0: none"""
    shard_tokens: int = 10_000_000
    """tokens in a full shard"""
    replace: bool = False
    """replace shards of another source, template or tokenizer in the folder"""


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
    "labels": (Labelled, "data", "JSON lines of texts and their labels, for a BERT that classifies"),
    "chat": (Chats, "chat", "chats, for fine-tuning: JSON lines"),
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
    elif word == "chat":
        make_chat(rest)
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
        bad = "bytes that are no UTF-8, and halves" if a.get("on_error") == "replace" else "halves"
        print(f"{bad} of characters in the text, now U+FFFD: {meta['replaced']:,}")
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


def make_labels(a: Labelled, folder: str) -> None:
    """Builds a data set of labelled texts, with a progress bar on a terminal, and prints its size."""
    if not a.files:
        raise HandgradError("data", "labels come from at least one file", "none", hint="handgrad data labels FILE...")
    tokenizer, out = tokenizer_of(a.tokenizer), a.out or folder
    pad = tokenizers.special_ids(tokenizer, ["[PAD]"])
    if pad is None:
        hint = "--tokenizer FOLDER, that of the BERT to start from"
        raise HandgradError("data", "labelled texts take a tokenizer with [PAD]", tokenizer.name, hint=hint)
    names = ("val_fraction", "seq_len", "shard_tokens", "workers", "replace", "special_tokens")
    given = {name: getattr(a, name) for name in names}
    given |= {"columns": data.Columns(a.column, a.label, a.pair, a.regression), "val": [Path(a.val)] if a.val else []}
    with bar() as progress:
        paths = [Path(file) for file in a.files]
        meta = data.prepare_labels(paths, out, tokenizer, pad["[PAD]"], progress=progress, **given)
    for split in ("train", "val"):
        texts = "pairs" if a.pair else "texts"
        print(f"{split:6} {meta[split]['tokens'] // meta['record']:>13,} {texts} of at most {a.seq_len} tokens")
    if a.regression:
        print(f"labels are {len(meta['values']):,} different numbers, {meta['values'][0]:g} to {meta['values'][-1]:g}")
    else:
        print(f"labels {', '.join(meta['labels'][:20])}{', ...' if len(meta['labels']) > 20 else ''}")
    print(f"train on them: handgrad train --init BERT --train {quote(out)}")


def make_chat(argv: list[str]) -> None:
    """Builds a data set of chats, with a progress bar on a terminal, and prints its size."""
    a = parse(Chats, argv, "data chat")
    if not a.files or not a.model:
        rule, got = "chat comes from at least one file, for a model", "none" if a.model else "no --model"
        raise HandgradError("data", rule, got, hint="handgrad data chat FILE... --model MODEL")
    encoder = tokenizers.ChatEncoder(*model_of(a.model), a.template)
    kind: dict[str, Any] = {"val_fraction": a.val_fraction, "shard_tokens": a.shard_tokens, "replace": a.replace}
    with bar(f"{a.out} is as it was") as progress:
        meta = data.prepare_chat(a.files, a.out, encoder.tokenizer, encoder, progress=progress, **kind)
    for split in ("train", "val"):
        m = meta[split]
        print(f"{split:6} {m['rows']:>11,} rows, {m['tokens']:,} tokens, {m['assistant']:,} of them the assistant's")
    print(f"longest row {meta['chat']['longest']:,} tokens; template {encoder.name}; vocabulary {meta['vocab_size']:,}")
    init = "MODEL" if is_tokenizer(a.model) else quote(a.model)
    print(f"train on it: handgrad train --init {init} --train {quote(a.out)} --lr 2e-5 --steps 0")


def model_of(word: str) -> tuple[tokenizers.Tokenizer, tokenizers.OwnTemplate]:
    """Returns the tokenizer of the model that `word` names, and the model's template."""
    if is_tokenizer(word):
        folder = Path(word).parent if word.endswith(".json") else Path(word)
        return tokenizer_of(word), tokenizers.template_in_folder(folder)
    source = open_source(word)
    return source.tokenizer(), source.template()


def is_tokenizer(word: str) -> bool:
    """Whether a word names a tokenizer, without a model."""
    return word == "gpt2" or word.endswith(".json")


class bar:
    """A progress bar on standard error while the block runs, if standard error is a terminal.

    kept: what is said of the folder when the user stops it
    """

    def __init__(self, kept: str = "finished shards are kept; the same command continues after them"):
        self.kept = kept

    def __enter__(self) -> Callable[[int, int, int], None]:
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]:,} tokens")
        console = Console(stderr=True)
        self.live = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.live.start()
        task = self.live.add_task("", tokens=0)
        return lambda read, size, tokens: self.live.update(task, completed=read, total=size, tokens=tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if kind is KeyboardInterrupt:
            print(self.kept, file=sys.stderr)


def check(argv: list[str]) -> None:
    """Verifies a folder against its checksums."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise HandgradError("data", "after check comes a folder", f"'{' '.join(argv)}'" if argv else "nothing")
    sizes = data.check(Path(argv[0]))
    print(f"{argv[0]}: {len(sizes)} files, {sum(sizes.values()):,} bytes, all as they were made")
