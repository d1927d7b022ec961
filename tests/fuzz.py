"""Fuzzes every reader through the command line: damaged files, and command lines that nobody would write.

    python tests/fuzz.py --inputs 20000                         all entries in turn, an hour on one core
    python tests/fuzz.py --inputs 2000 --only convert,resume    entries whose name contains a word

`handgrad` runs in this process. Right is: exit code 0, or 2 with one line "[where] ..." on stderr; no traceback, at most
2 s of processor time and 1 GiB of memory, and no input changed. The script goes on after a problem and prints each kind
of it once, with the input that showed it first; tests/test_fuzz_cli.py stops at the first.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import Odd, changes, remove

from handgrad.cli.__main__ import VERBS, main

SECONDS, HANGS, BYTES = 2.0, 10, 2**30  # processor time; wall time after which a command hangs; growth of memory
TINY = (
    "--num-layers 1 --num-heads 1 --hidden-size 8 --max-seq-len 8 --micro-batch 1 "
    "--threads 1 --val-tokens 8 --sample-tokens 2 --warmup 0"
).split()
ONE_STEP = [*TINY, "--steps", "1"]


@dataclass(frozen=True)
class Reader:
    """A file that a command line reads.

    name: of the entry;  argv: in words;  file: the one that is damaged;  kind: see `changes`
    writes: inputs that the command may change
    """

    name: str
    argv: str
    file: str
    kind: str = "bytes"
    writes: tuple[str, ...] = ()


TRAIN = f"train {' '.join(ONE_STEP)} --out out"
INIT = "train --threads 1 --micro-batch 1 --steps 1 --sample-tokens 2 --val-tokens 8 --out out"
RESUME = "train --resume run --steps 3"
CHECKPOINT = "run/step_000002"
RUN_FILES = (("run.json", "json"), ("model.safetensors", "safetensors"))
HF_FILES = (("config.json", "json"), ("model.safetensors", "safetensors"), ("tokenizer.json", "json"))
TASKS = {
    "hellaswag": "hellaswag.jsonl",
    "lambada": "lambada.jsonl",
    "piqa": "piqa.jsonl",
    "arc_easy": "arc.jsonl",
    "winogrande": "winogrande.jsonl",
}
CHATS = "--model tok.json --template chats.jinja --out out"
READERS = [
    Reader("train shard", f"{TRAIN} --train data", "data/train_000000.bin", "words"),
    Reader("train val shard", f"{TRAIN} --train data", "data/val_000000.bin", "words"),
    Reader("train glob", f"{TRAIN} --train data/train_*.bin", "data/train_000000.bin", "words"),
    Reader("train meta.json", f"{TRAIN} --train data", "data/meta.json", "json"),
    Reader("train tokenizer.json", f"{TRAIN} --train data", "data/tokenizer.json", "json"),
    Reader("train chars", f"{TRAIN} --train letters", "letters/meta.json", "json"),
    Reader("train hellaswag", f"{TRAIN} --train data --hellaswag questions.bin", "questions.bin", "words"),
    Reader(
        "train hellaswag jsonl",
        f"{TRAIN} --train data --hellaswag hellaswag.jsonl",
        "hellaswag.jsonl",
        "jsonl",
    ),
    *(Reader(f"init hf {f}", f"{INIT} --train data --init hf", f"hf/{f}", kind) for f, kind in HF_FILES),
    *(Reader(f"init run {f}", f"{INIT} --train data --init run", f"{CHECKPOINT}/{f}", kind) for f, kind in RUN_FILES),
    Reader("init llmc", f"{INIT} --train data --init model.bin", "model.bin", "words"),
    *(Reader(f"resume {f}", RESUME, f"{CHECKPOINT}/{f}", kind, ("run/",)) for f, kind in RUN_FILES),
    Reader("resume state", RESUME, f"{CHECKPOINT}/state.rank00.safetensors", "safetensors", ("run/",)),
    Reader("resume config.json", RESUME, "run/config.json", "json", ("run/",)),
    Reader("resume log.jsonl", RESUME, "run/log.jsonl", "jsonl", ("run/",)),
    Reader("resume tokenizer", RESUME, "run/tokenizer-spec.json", "json", ("run/",)),
    Reader("resume tokenizer.json", RESUME, "run/tokenizer.json", "json", ("run/",)),
    *(
        Reader(f"generate run {f}", "generate run --threads 1 --max-tokens 2", f"{CHECKPOINT}/{f}", kind)
        for f, kind in RUN_FILES
    ),
    Reader("generate run tokenizer", "generate run --threads 1 --max-tokens 2", "run/tokenizer-spec.json", "json"),
    *(Reader(f"generate hf {f}", "generate hf --threads 1 --max-tokens 2", f"hf/{f}", kind) for f, kind in HF_FILES),
    Reader(
        "generate hf index",
        "generate sharded --threads 1 --max-tokens 2",
        "sharded/model.safetensors.index.json",
        "json",
    ),
    Reader("generate hf vocab.json", "generate slow --threads 1 --max-tokens 2", "slow/vocab.json", "json"),
    Reader("generate hf merges.txt", "generate slow --threads 1 --max-tokens 2", "slow/merges.txt"),
    Reader(
        "generate hf tokenizer_config", "generate slow --threads 1 --max-tokens 2", "slow/tokenizer_config.json", "json"
    ),
    Reader("generate llmc", "generate letters.bin --threads 1 --max-tokens 2", "letters.bin", "words"),
    Reader(
        "generate llmc tokenizer", "generate letters.bin --threads 1 --max-tokens 2", "letters_tokenizer.bin", "words"
    ),
    *(
        Reader(f"eval {task}", f"eval run --threads 1 --tasks {task}={file} --out out.json", file, "jsonl")
        for task, file in TASKS.items()
    ),
    Reader("eval mmlu", "eval run --threads 1 --tasks mmlu=mmlu/test --out out.json", "mmlu/test/law_test.csv"),
    Reader("eval piqa labels", "eval run --threads 1 --tasks piqa=piqa.jsonl --out out.json", "piqa-labels.lst"),
    Reader(
        "eval choices", "eval run --threads 1 --tasks hellaswag=questions.bin --out out.json", "questions.bin", "words"
    ),
    Reader("eval gz", "eval run --threads 1 --tasks hellaswag=hellaswag.jsonl.gz --out out.json", "hellaswag.jsonl.gz"),
    Reader("eval xz", "eval run --threads 1 --tasks hellaswag=hellaswag.jsonl.xz --out out.json", "hellaswag.jsonl.xz"),
    Reader(
        "eval eval.json",
        "eval run --threads 1 --limit 1 --tasks hellaswag=hellaswag.jsonl",
        "run/eval.json",
        "json",
        ("run/eval.json",),
    ),
    Reader("eval val", "eval run --threads 1 --limit 1 --out out.json", "data/val_000000.bin", "words"),
    Reader("eval config.json", "eval run --threads 1 --limit 1 --out out.json", "run/config.json", "json"),
    *(Reader(f"convert run {f}", "convert run out", f"{CHECKPOINT}/{f}", kind) for f, kind in RUN_FILES),
    Reader("convert run to llmc", "convert run out.bin", f"{CHECKPOINT}/run.json", "json"),
    *(Reader(f"convert hf {f}", "convert hf out", f"hf/{f}", kind) for f, kind in HF_FILES),
    Reader("convert llmc", "convert model.bin out --to hf", "model.bin", "words"),
    Reader("convert llmc state", "convert log out", "log/state_00000002_00000.bin", "words"),
    Reader("convert llmc model", "convert log out", "log/model_00000002.bin", "words"),
    Reader("generate gguf", "generate bpe.gguf --threads 1 --max-tokens 2", "bpe.gguf"),
    Reader("convert gguf", "convert bpe.gguf out --to hf", "bpe.gguf", "words"),
    Reader("report log.jsonl", "report run --out out.html", "run/log.jsonl", "jsonl"),
    *(
        Reader(f"report {f}", "report run --out out.html", f"run/{f}", "json")
        for f in ("config.json", "run.json", "eval.json")
    ),
    Reader("report two", "report run other --out out.html", "other/config.json", "json"),
    Reader("report sample", "report run --out out.html", "run/sample.txt"),
    Reader("report memory", "report run --out out.html", "run/memory.txt"),
    Reader("data text", "data text text.txt --workers 1 --tokenizer tok.json --out out", "text.txt"),
    Reader("data chars", "data text text.txt --workers 1 --tokenizer chars --out out", "text.txt"),
    Reader("data tokenizer.json", "data text text.txt --workers 1 --tokenizer tok.json --out out", "tok.json", "json"),
    Reader(
        "data shakespeare",
        "data shakespeare --source plays.txt --workers 1 --tokenizer tok.json --out out",
        "plays.txt",
    ),
    Reader(
        "data jsonl",
        "data jsonl rows.jsonl --workers 1 --tokenizer tok.json --val-tokens 2 --out out",
        "rows.jsonl",
        "jsonl",
    ),
    *(
        Reader(
            f"data {e}",
            f"data jsonl rows.jsonl.{e} --workers 1 --tokenizer tok.json --val-tokens 2 --out out",
            f"rows.jsonl.{e}",
        )
        for e in ("gz", "xz", "bz2")
    ),
    Reader(
        "data parquet",
        "data parquet rows.parquet --workers 1 --tokenizer tok.json --val-tokens 2 --out out",
        "rows.parquet",
    ),
    *(
        Reader(f"data chat {e}", f"data chat chats.{e} {CHATS}", f"chats.{e}", kind)
        for e, kind in (("jsonl", "jsonl"), ("json", "json"), ("parquet", "bytes"))
    ),
    Reader("data chat skip", f"data chat chats.jsonl {CHATS} --on-error skip", "chats.jsonl", "jsonl"),
    Reader(
        "data labels parquet",
        "data labels labels.parquet --tokenizer vocab.txt --workers 1 --on-error skip --out out",
        "labels.parquet",
    ),
    Reader(
        "data fineweb",
        "data fineweb --source rows.parquet --workers 1 --tokenizer tok.json --shard-tokens 300 --out out",
        "rows.parquet",
    ),
    Reader(
        "data tinystories",
        "data tinystories --source stories --workers 1 --tokenizer tok.json --out out",
        "stories/data00.json",
        "json",
    ),
    Reader(
        "data tinystories tar",
        "data tinystories --source stories.tar.gz --workers 1 --tokenizer tok.json --out out",
        "stories.tar.gz",
    ),
    Reader(
        "data openwebtext",
        "data openwebtext --source pages.tar --workers 1 --tokenizer tok.json --shard-tokens 300 --out out",
        "pages.tar",
    ),
    Reader(
        "data openwebtext xz",
        "data openwebtext --source pages.xz --workers 1 --tokenizer tok.json --shard-tokens 300 --out out",
        "pages.xz",
    ),
    Reader(
        "data hellaswag",
        "data hellaswag --source hellaswag.jsonl --tokenizer tok.json --out out",
        "hellaswag.jsonl",
        "jsonl",
    ),
    Reader(
        "data hellaswag parquet",
        "data hellaswag --source questions.parquet --tokenizer tok.json --out out",
        "questions.parquet",
    ),
    Reader("data mmlu", "data mmlu --source mmlu --tokenizer tok.json --out out", "mmlu/test/law_test.csv"),
    Reader("data check", "data check data", "data/SHA256SUMS"),
    Reader("data check meta", "data check data", "data/meta.json", "json"),
    Reader(
        "data again",
        "data text text.txt --workers 1 --tokenizer tok.json --out data",
        "data/meta.json",
        "json",
        ("data/",),
    ),
    Reader(
        "data progress",
        "data text text.txt --workers 1 --tokenizer tok.json --out half",
        "half/.preparing/progress.json",
        "json",
        ("half/",),
    ),
]


# a healthy file of every kind -----------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Fills a folder with everything that READERS name."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        texts()
        questions()
        for argv in (
            "data text text.txt --tokenizer tok.json --workers 1 --out data",
            "data text text.txt --tokenizer tok.json --workers 1 --out half",
            "data text text.txt --tokenizer chars --workers 1 --out letters",
            f"train {' '.join(ONE_STEP)} --steps 2 --dtype f32 --train data --out run",
            "convert run hf",
            "convert run sharded",
            "convert run slow",
            "convert run model.bin",
            f"train {' '.join(ONE_STEP)} --train letters --out spelled",
            "convert spelled letters.bin",
            "eval run --limit 1 --threads 1 --tasks hellaswag=hellaswag.jsonl,val",
            "data hellaswag --source hellaswag.jsonl --tokenizer tok.json --out .",
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                if main(argv.split()):
                    raise SystemExit(f"handgrad {argv} failed")
        os.rename("hellaswag_val.bin", "questions.bin")
        shutil.copytree("run", "other")
        models()
        unfinished()


def texts() -> None:
    from tokenizers import ByteLevelBPETokenizer

    text = "to be, or not to be\n\nthat is the question\n"
    Path("text.txt").write_text(text * 20)
    Path("plays.txt").write_text(text * 1500)
    bpe = ByteLevelBPETokenizer()
    bpe.train(["text.txt"], vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save("tok.json")
    rows = "".join(json.dumps({"text": f"to be or not to be {i}", "url": None}) + "\n" for i in range(9)).encode()
    Path("rows.jsonl").write_bytes(rows)
    for ending, module in (("gz", gzip), ("xz", lzma), ("bz2", bz2)):
        Path(f"rows.jsonl.{ending}").write_bytes(module.compress(rows))
    chats = [{"messages": [{"role": role, "content": "to be"} for role in ("user", "assistant")], "tools": None}] * 9
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    Path("chats.json").write_text(json.dumps(chats))
    Path("chats.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nto\nbe\n")
    Path("stories").mkdir()
    for i in range(2):
        Path(f"stories/data0{i}.json").write_text(json.dumps([{"story": f"once upon {j}", "n": j} for j in range(4)]))
    with tarfile.open("stories.tar.gz", "w:gz") as tar:
        tar.add("stories")
    with tarfile.open("pages.xz", "w:xz") as tar:
        for i in range(2):
            tar.add("text.txt", f"page{i}.txt")
    with tarfile.open("pages.tar", "w") as tar:
        tar.add("pages.xz", "subsets/pages.xz")


def questions() -> None:
    rows = {
        "hellaswag": {"ctx": "a man", "endings": ["sits", "runs", "is", "eats"], "label": 1, "activity_label": "b"},
        "lambada": {"text": "to be or not to be"},
        "piqa": {"goal": "to be", "sol1": "sit", "sol2": "run"},
        "arc": {
            "question": {"stem": "to be", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
            "answerKey": "A",
        },
        "winogrande": {"sentence": "that _ is", "option1": "man", "option2": "dog", "answer": "1"},
    }
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    Path("piqa-labels.lst").write_text("0\n1\n")
    raw = Path("hellaswag.jsonl").read_bytes()
    Path("hellaswag.jsonl.gz").write_bytes(gzip.compress(raw))
    Path("hellaswag.jsonl.xz").write_bytes(lzma.compress(raw))
    Path("mmlu/test").mkdir(parents=True)
    Path("mmlu/test/law_test.csv").write_text('what is,a,b,c,d,A\n"to, be",1,2,3,4,D\n')
    with contextlib.suppress(ImportError):  # without pyarrow these entries end with the error that says so
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [f"to be {i}" for i in range(99)]}), "rows.parquet", row_group_size=40)
        pq.write_table(pa.table({"ctx": ["a man"], "endings": [["sits", "runs"]], "label": ["1"]}), "questions.parquet")
        pq.write_table(pa.Table.from_pylist(json.loads(Path("chats.json").read_bytes())), "chats.parquet")
        pq.write_table(
            pa.table({"text": [f"to be {i}" for i in range(99)], "label": [1, 2, 1] * 33}),
            "labels.parquet",
            row_group_size=4,
        )
    for name in ("rows.parquet", "questions.parquet", "chats.parquet", "labels.parquet"):
        Path(name).touch()


def models() -> None:
    """A sharded Hugging Face folder, one with a slow tokenizer, and a folder in which llm.c trains."""
    whole = "model.safetensors"
    names = [
        name
        for name in json.loads(Path("hf", whole).read_bytes()[8:].split(b"}}")[0] + b"}}")
        if name != "__metadata__"
    ]
    os.rename(f"sharded/{whole}", "sharded/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {name: "model-00001-of-00001.safetensors" for name in names}}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    bpe = json.loads(Path("tok.json").read_text())["model"]
    os.unlink("slow/tokenizer.json")
    Path("slow/vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    Path("slow/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    Path("slow/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):  # as with pyarrow
        import gguf  # noqa: F401

        main("convert run bpe.gguf".split())
    Path("bpe.gguf").touch()
    Path("log").mkdir()
    shutil.copy("model.bin", "log/model_00000002.bin")
    shutil.copy("model_tokenizer.bin", "log/gpt2_tokenizer.bin")
    Path("log/DONE_00000002").touch()
    header = np.zeros(256, "<i4")
    header[[0, 1, 2, 10]] = 20240527, 1, 1, 2  # magic, version, processes, step
    count = (os.path.getsize("model.bin") - 1024) // 4
    Path("log/state_00000002_00000.bin").write_bytes(header.tobytes() + bytes(8 * count))


def unfinished() -> None:
    """half/: shards whose preparation was killed before they got their names."""
    os.mkdir("half/.preparing")
    meta = json.loads(Path("half/meta.json").read_text())
    shards = [
        {"split": split, "name": name, "tokens": meta[split]["tokens"], "sha256": "0" * 64}
        for split in ("train", "val")
        for name in meta[split]["shards"]
    ]
    for path in sorted(Path("half").glob("*.*")):
        if path.is_file():
            path.rename(f"half/.preparing/{path.name}")
    done = {"part": 1, "job": 0, "ids": 5, "shards": shards}
    Path("half/.preparing/progress.json").write_text(json.dumps({"plan": "0" * 64, "done": done}))


# one command ----------------------------------------------------------------------------------------------------------


class Hangs(BaseException):
    """A command did not end in time."""


@dataclass
class World:
    """A copy of the healthy files in which commands run, and how they were."""

    healthy: Path
    folder: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.healthy, self.folder)
        self.known = self.look()

    def look(self) -> dict[str, tuple[int, int, int]]:
        """Inode, size and time of change of every file."""
        found = {}
        for root, _, names in os.walk(self.folder):
            for name in names:
                s = os.lstat(os.path.join(root, name))
                found[os.path.relpath(os.path.join(root, name), self.folder)] = s.st_ino, s.st_size, s.st_mtime_ns
        return found

    def restore(self, also: str = "") -> list[str]:
        """Makes all files healthy again; returns the inputs that had changed, without `also`."""
        now = self.look()
        wrong = [path for path, known in self.known.items() if now.get(path) != known]
        for path in {*wrong, *(now.keys() - self.known.keys())} | ({also} if also else set()):
            remove(self.folder / path)
        for path in os.listdir(self.folder):
            if not (self.healthy / path).exists():
                remove(self.folder / path)
        for path in {*wrong} | ({also} if also else set()):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.healthy / path, self.folder / path)
        if wrong or also:
            self.known |= {path: self.look()[path] for path in {*wrong, *([also] if also else [])}}
        return [path for path in wrong if path != also]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises Hangs in a block that takes more than HANGS seconds, or three times SECONDS of processor time."""
    running = True

    def hang(*_) -> None:
        if running:
            raise Hangs

    kept = [(number, signal.signal(number, hang)) for number in (signal.SIGALRM, signal.SIGPROF)]
    try:
        signal.setitimer(signal.ITIMER_REAL, HANGS)
        signal.setitimer(signal.ITIMER_PROF, 3 * SECONDS)
        yield
    finally:
        running = False
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in kept:
            signal.signal(number, handler)


def command(argv: list[str], stdin: bytes = b"") -> tuple[str, str]:
    """(what is wrong with the end of a command or "", its traceback or stderr)."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    streams, interrupt = (sys.stdin, sys.stdout, sys.stderr), signal.getsignal(signal.SIGINT)
    before, begin = peak(reset=True), time.process_time()
    try:
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin)), out, err
        with limited():
            code: int | None = main(argv)
    except (Exception, Hangs) as error:  # whatever leaves main is a finding
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/handgrad/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        return f"{type(error).__name__} in {where}", traceback.format_exc()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    seconds, grown = time.process_time() - begin, peak() - before
    err.flush()
    said = err.buffer.getvalue().decode("utf-8", "replace")
    if signal.getsignal(signal.SIGINT) is not interrupt:
        return "the handler of SIGINT has changed", said
    if code not in (0, 2):
        return f"exit code {code}", said
    if code == 2 and not re.fullmatch(r"\[[\w .-]+\] [^\n]*\n", said):
        return "exit code 2 without its one line", said
    if "Traceback" in said:
        return "a traceback in stderr", said
    if seconds > SECONDS:
        return f"more than {SECONDS} s of processor time", f"{seconds:.1f} s; {said}"
    if grown > BYTES:
        return "more than 1 GiB of memory", f"{grown / 2**20:.0f} MiB; {said}"
    return "", said


def apart(argv: list[str], stdin: bytes = b"") -> tuple[str, str]:
    """`command` in a process of its own: no signal handler ends a library's call that waits for the writer of a FIFO."""
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            try:
                answer.write(json.dumps(command(argv, stdin)))
                answer.flush()
            finally:
                os._exit(0)
        deadline = time.monotonic() + HANGS
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "Hangs", f"still running after {HANGS} s"
            time.sleep(0.002)
        answer.seek(0)
        wrong, said = json.loads(answer.read() or '["the process died", ""]')
        return wrong, said


def peak(reset: bool = False) -> int:
    """The most memory that this process has held since the last reset, bytes; 0 where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    except (OSError, TypeError):
        return 0


# entries --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """kind: the same for the same fault;  shown: the input and what came of it."""

    kind: str
    shown: str


def damaged(world: World, reader: Reader, change) -> Problem | None:
    """Runs a reader's command with its file damaged."""
    path = world.folder / reader.file
    if isinstance(change, Odd):
        change.put(path)
        shown = change.kind
    else:
        raw = change(path.read_bytes())
        path.write_bytes(raw)
        shown = repr(raw[:1000])
    before = os.lstat(path).st_mtime_ns if path.exists() else 0
    with contextlib.chdir(world.folder):
        wrong, said = (apart if isinstance(change, Odd) else command)(reader.argv.split())
    touched = [reader.file] if before and (not path.exists() or os.lstat(path).st_mtime_ns != before) else []
    touched += world.restore(reader.file)
    changed = [p for p in touched if not (reader.writes and p.startswith(reader.writes))]
    if not wrong and changed:
        wrong = f"changed its inputs: {', '.join(changed[:3])}"
    if not wrong:
        return None
    return Problem(f"{reader.argv.split()[0]}: {wrong}", f"{reader.name}: {reader.file} is {shown}\n{end(said)}")


BASES = {
    "train": f"{TRAIN} --train data",
    "generate": "generate run --threads 1 --max-tokens 2",
    "eval": "eval run --threads 1 --limit 1 --tasks hellaswag=hellaswag.jsonl --out out.json",
    "convert": "convert run out",
    "report": "report run --out out.html",
    "explain": "explain tiny --threads 1",
    "profile": "profile tiny --threads 1 --micro-batch 1 --seq-len 8 --steps 1 --backend cpu",
    "data text": "data text text.txt --tokenizer tok.json --workers 1 --out out",
    "data jsonl": "data jsonl rows.jsonl --tokenizer tok.json --workers 1 --val-tokens 2 --out out",
    "data chat": f"data chat chats.jsonl {CHATS}",
    "data hellaswag": "data hellaswag --source hellaswag.jsonl --tokenizer tok.json --out out",
    "data check": "data check data",
    "ops": "ops support",
    "doctor": "doctor",
}
PLACES = [
    "folder",
    "fifo",
    "broken",
    "loop",
    "deep/a/b",
    "x" * 300,
    "a\0b",
    "new/x",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "data",
    "run",
    "hf",
    "text.txt",
]
TEXTS = ["", " ", "-", "--", "-h", "None", "True", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_000", "\u0663", "é\u2028", "\udcff", "\n", "\x1b[31m", "*", "[", "%s", "{}", "hf:", "hf:../x", "hf:a/b/c", "=", "y" * 5000, "9" * 400, "9" * 5000]  # fmt: skip
COUNTS = ["-1", "0", "1", "2", "3", "7", "2.5", "-0", "00", str(2**31), str(2**63), str(-(2**63) - 1), str(2**64)]
LONG = re.compile(r"steps$|tokens$|accumulation$|workers$")  # flags whose large numbers ask for long work


def flags_of(argv: str) -> list[str]:
    """The flags of a verb, from its help."""
    words = argv.split()[: 2 if argv.startswith("data") else 1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main([*words, "--help"])
    found = sorted(set(re.findall(r"--[a-z][\w.-]*\w", out.getvalue())) - {"--help"})
    return [flag for flag in found if not re.search("tensorboard|wandb|force", flag)]


@st.composite
def command_lines(draw, base: str, flags: list[str]):
    """A command line that works, with flags and words that do not."""
    words = base.split()
    value = st.sampled_from([*TEXTS, *COUNTS, *PLACES]) | st.text(max_size=4)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flag", "flag", "flag", "flag", "equals", "word", "typo", "drop", "replace"]))
        flag = draw(st.sampled_from(flags)) if flags else "--none"
        new = draw(value)
        if LONG.search(flag) and re.fullmatch(r"\s*[\d_]{2,}\s*|\u0663", new):
            new = "2"
        if kind == "flag":
            words += [flag, new]
        elif kind == "equals":
            words.append(f"{flag}={new}")
        elif kind == "word":
            words.insert(draw(st.integers(1, len(words))), new)
        elif kind == "typo":
            words += [flag[: draw(st.integers(1, len(flag)))] + draw(st.text(max_size=2)), new]
        elif kind == "drop" and len(words) > 1:
            del words[draw(st.integers(1, len(words) - 1))]
        elif kind == "replace" and len(words) > 1:
            at = draw(st.integers(1, len(words) - 1))
            words[at] = "2" if LONG.search(words[at - 1]) else new
    return words


def furnish(folder: Path) -> None:
    """Puts what PLACES names into a folder."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "deep").mkdir()


def odd_words(world: World, name: str, argv: list[str]) -> Problem | None:
    """Runs a command line of an entry."""
    furnish(world.folder)
    with contextlib.chdir(world.folder):
        wrong, said = (apart if any("fifo" in word for word in argv) else command)(argv, b"to be")
    world.restore()  # it may have named an input as its output
    return Problem(f"{name}: {wrong}", f"argv {[word[:300] for word in argv]}\n{end(said)}") if wrong else None


def end(said: str) -> str:
    """The last lines of a traceback, or of what was said on stderr."""
    return "\n".join(line for line in said.splitlines() if not re.fullmatch(r"[ ^~]*", line))[-500:]


def entries(world: World) -> Iterator[tuple[str, object, object]]:
    """(name, strategy of an input, function of an input -> Problem or None) of everything that is fuzzed."""
    for reader in READERS:
        yield reader.name, changes(reader.kind), lambda change, reader=reader: damaged(world, reader, change)
    for name, base in BASES.items():
        yield f"argv {name}", command_lines(base, flags_of(base)), lambda argv, name=name: odd_words(world, name, argv)
    anything = st.lists(
        st.sampled_from([*VERBS, *TEXTS[:20], "--help", "--version", "help"]) | st.text(max_size=6),
        min_size=1,
        max_size=3,
    )
    yield (
        "argv of any verb",
        anything.filter(lambda words: words[0] not in ("train", "profile")),
        lambda argv: odd_words(world, "any verb", argv),
    )


def fuzzed(strategy, judge, inputs: int, seen) -> None:
    """Calls `seen` with the judgement of so many inputs, the same ones at every call."""

    @settings(
        max_examples=inputs,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(given_input):
        seen(judge(given_input))

    one()


def script() -> int:
    """Returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--only", default="", help="entries whose names contain one of these words, with commas")
    a = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, resource.RLIM_INFINITY))
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    found: dict[str, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "healthy")
        world = World(Path(folder) / "healthy", Path(folder) / "world")
        chosen = [e for e in entries(world) if any(word in e[0] for word in a.only.split(","))]
        for name, strategy, judge in chosen:
            begin, before = time.perf_counter(), sum(times for times, _ in found.values())

            def seen(problem: Problem | None) -> None:
                if problem:
                    times, shown = found.get(problem.kind, (0, problem.shown))
                    found[problem.kind] = times + 1, shown

            each = -(-a.inputs // len(chosen))
            fuzzed(strategy, judge, each, seen)
            wrong = sum(times for times, _ in found.values()) - before
            print(f"{name}: {each} inputs, {wrong} wrong, {time.perf_counter() - begin:.0f} s", flush=True)
    for kind, (times, shown) in found.items():
        print(f"\n== {times} x {kind}\n{shown}")
    print(f"\n{len(found)} kinds of problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(script())
