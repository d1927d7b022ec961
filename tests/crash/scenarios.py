"""Commands that all_instants.py stops: what their folder holds at first, and what must hold in every state and at the end."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from replay import Call, Disk, Tree, below, calls, cuts, grow, harvest, plant

from handgrad.cli.__main__ import main as handgrad

for verb in ("train", "convert", "data", "report"):
    importlib.import_module(f"handgrad.cli.{verb}")  # here, not in every fork

STEPS = 6
TRAIN = (
    "--num-layers 1 --num-heads 1 --hidden-size 16 --max-seq-len 16 --dropout 0.1 "
    "--micro-batch 2 --threads 1 --val-every 2 --val-tokens 32 --sample-every 3 "
    f"--sample-tokens 4 --save-every 2 --resume auto --steps {STEPS}"
).split()
LORA = ("--lora-rank", "2")
TIMES = ("seconds", "tokens_per_second", "mfu")
# the command under powercut.c marks in the journal when a save and when the verb have returned
MARKED = """
import os, sys
import mutants
from handgrad.io import checkpoint
getattr(mutants, sys.argv.pop(1), int)()
save = checkpoint.save
def marked(out_dir, step, *args, **kwargs):
    path = save(out_dir, step, *args, **kwargs)
    os.access(f"disk/:{step}", 0)
    return path
checkpoint.save = marked
from handgrad.cli.__main__ import main
code = main(sys.argv[1:])
os.access("disk/:returned", 0)
sys.exit(code)
"""


@dataclass(frozen=True)
class Scenario:
    """A command line whose files lie in disk/ of the current folder.

    before: what disk/ holds at first;  check: (tree, marks so far) -> what is wrong with a state, or "";
    end: tree -> what is wrong once the command has been repeated, or ""
    """

    argv: list[str]
    before: Tree
    check: Callable[[Tree, set[str]], str]
    end: Callable[[Tree], str]


# running commands -----------------------------------------------------------------------------------------------------


def run(where: Path, argv: list[str]) -> str:
    """Runs a verb in a fork of this process, in a folder; "", or what it printed if it failed."""
    said = where / "said"
    child = os.fork()
    if child == 0:
        os.chdir(where)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            os._exit(handgrad(argv))
        finally:
            os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.read_text(errors="replace")
    return f"exit code {code}: {' '.join(text.split())[-300:]}" if code else ""


def done(where: Path, before: Tree, argv: list[str]) -> Tree:
    """What disk/ holds after a command that nothing stopped."""
    plant(before, where / "disk")
    problem = run(where, argv)
    if problem:
        raise SystemExit(f"handgrad {' '.join(argv)}: {problem}")
    return harvest(where / "disk")


def record(tool: Path, where: Path, scenario: Scenario, mutant: str, kill: int = 0) -> tuple[Disk, list[Call]]:
    """(disk/ as it was, the calls) of the scenario's command, killed in front of call number `kill` if that is not 0."""
    plant(scenario.before, where / "disk")
    disk, journal = Disk(grow(where / "disk")), where / "journal"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [tool, "disk", journal, str(kill), "1", sys.executable, "-c", MARKED, mutant, *scenario.argv]
    ended = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True)
    if ended.returncode == 77:
        raise SystemExit("ptrace is forbidden here")
    if ended.returncode != (137 if kill else 0):
        raise SystemExit(f"the recorded command ended with {ended.returncode}: {ended.stderr[-500:]}")
    return disk, calls(journal)


# scenarios ------------------------------------------------------------------------------------------------------------


def train(tool: Path, work: Path, tune: Sequence[str] = ()) -> Scenario:
    """A run from its first step to its last. tune: what learns in it, if not all"""
    argv = ["train", *TRAIN, *tune, "--train", str(data(work)), "--out", "disk/run"]
    whole = below(done(work / "whole", {}, [*argv, "--keep-last", "0"]), "run")  # every checkpoint
    return Scenario(
        [*argv, "--keep-last", "2"],
        {},
        lambda tree, marks: wrong_run(below(tree, "run"), marks, whole),
        lambda tree: wrong_end(below(tree, "run"), whole),
    )


def resume(tool: Path, work: Path, tune: Sequence[str] = ()) -> Scenario:
    """The same run, killed once already, when it had just saved step 4."""
    fresh = train(tool, work, tune)
    disk, found = record(tool, work / "first", fresh, "")
    for call in found[: [str(call) for call in found].index("mark ./:4")]:
        disk.do(call)
    _, tree = next(cuts(disk, random.Random(0), 0))
    return replace(fresh, before=tree)


def convert(tool: Path, work: Path, to: str) -> Scenario:
    """A model over an older one of its kind, under the same name."""
    argv = ["train", *TRAIN, "--train", str(data(work)), "--out"]
    for name, seed in (("old", "1"), ("new", "2")):
        run(work, [*argv, name, "--seed", seed])
    source, name = str(work / "new"), {"hf": "model", "llmc": "model.bin", "handgrad": "model"}[to]
    if to == "handgrad":
        for old in ("old", "new"):
            run(work, ["convert", old, f"{old}.bin"])
        source += ".bin"
    argv = [f"disk/{name}", "--force", "--to", to]
    before = done(work / "before", {}, ["convert", source.replace("new", "old"), *argv])
    after = done(work / "after", before, ["convert", source, *argv])
    kinds = [models(before, name), models(after, name)]
    return Scenario(
        ["convert", source, *argv],
        before,
        lambda tree, marks: wrong_model(models(tree, name), kinds[1:] if ":returned" in marks else kinds),
        lambda tree: "" if models(tree, name) == kinds[1] else "not the converted model",
    )


def text(tool: Path, work: Path) -> Scenario:
    """Shards of a text, in a new folder."""
    return shards(work, {})


def reshard(tool: Path, work: Path) -> Scenario:
    """Shards of a text, in place of those of another."""
    (work / "other.txt").write_text("abc 0123456789\n" * 40)
    argv = ["data", "text", str(work / "other.txt"), "--tokenizer", "chars", "--workers", "1", "--out", "disk/data"]
    return shards(work, done(work / "older", {}, argv))


def shards(work: Path, before: Tree) -> Scenario:
    (work / "text.txt").write_text("0123456789 abc\n" * 60)
    argv = ["data", "text", str(work / "text.txt"), "--tokenizer", "chars", "--workers", "1", "--out", "disk/data"]
    argv += ["--shard-tokens", "300", "--replace"]
    after = done(work / "after", before, argv)
    whole = [below(after, "data")] + ([below(before, "data")] if before else [])

    def check(tree: Tree, marks: set[str]) -> str:
        found = below(tree, "data")
        if ":returned" in marks and differences(found | whole[0], found):  # .preparing may be back
            return "the finished folder is not on disk"
        if "meta.json" not in found:
            return ""
        fitting = [w for w in whole if all(found.get(path) == content for path, content in w.items())]
        return "" if fitting else "meta.json describes other shards than there are"

    return Scenario(argv, before, check, lambda tree: differences(below(tree, "data"), whole[0]))


def report(tool: Path, work: Path) -> Scenario:
    """The page of a run, over an older one."""
    argv = ["train", *TRAIN, "--train", str(data(work)), "--out", "disk/run"]
    before = done(work / "before", {}, argv) | {"run/report.html": b"an older page"}
    after = done(work / "after", before, ["report", "disk/run"])
    pages = [before["run/report.html"], after["run/report.html"]]

    def check(tree: Tree, marks: set[str]) -> str:
        rest = {path for path in before if tree.get(path, b"") != before[path]} - {"run/report.html"}
        if rest:
            return f"changed: {', '.join(rest)}"
        return "" if tree.get("run/report.html") in pages[":returned" in marks :] else "no page, or half of one"

    def end(tree: Tree) -> str:  # a temporary file may stay: the page is written beside its name
        return differences({path: content for path, content in tree.items() if ".tmp-" not in path}, after)

    return Scenario(["report", "disk/run"], before, check, end)


SCENARIOS: dict[str, Callable[[Path, Path], Scenario]] = {
    "train": train,
    "resume": resume,
    "lora": lambda tool, work: train(tool, work, LORA),
    "lora-resume": lambda tool, work: resume(tool, work, LORA),
    "convert-hf": lambda tool, work: convert(tool, work, "hf"),
    "convert-llmc": lambda tool, work: convert(tool, work, "llmc"),
    "convert-handgrad": lambda tool, work: convert(tool, work, "handgrad"),
    "data-text": text,
    "data-replace": reshard,
    "report": report,
}


def data(work: Path) -> Path:
    """A folder of shards of characters."""
    folder = work / "data"
    (work / "text.txt").write_text("0123456789 abc\n" * 100)
    run(work, ["data", "text", "text.txt", "--tokenizer", "chars", "--workers", "1", "--out", "data"])
    return folder


# what must hold -------------------------------------------------------------------------------------------------------


def log_of(tree: Tree) -> list[bytes]:
    """The whole lines of log.jsonl that are of steps, without the times; an event may say what a power cut damaged."""
    found = []
    for row in (tree.get("log.jsonl") or b"").split(b"\n")[:-1]:
        try:
            line = json.loads(row)
        except ValueError:
            found.append(row)
            continue
        if "event" not in line:
            found.append(json.dumps({key: x for key, x in line.items() if key not in TIMES}).encode())
    return found


def steps_of(tree: Tree) -> dict[int, str]:
    """step: folder, of the checkpoints that say they are complete."""
    found = {path.split("/")[0] for path in tree if path.endswith("/DONE") and path.startswith("step_")}
    names = sorted((name for name in found if re.fullmatch(r"step_\d{6}(\.old)?", name)), reverse=True)
    return {int(name[5:11]): name for name in names}


def wrong_run(tree: Tree, marks: set[str], whole: Tree) -> str:
    """What is wrong with a run folder that something stopped."""
    for step, name in steps_of(tree).items():
        for file, content in below(whole, f"step_{step:06d}").items():
            if file.endswith(".safetensors") and tree.get(f"{name}/{file}") != content:
                return f"{name} has DONE, but not its {file}"
        try:
            if json.loads(tree.get(f"{name}/run.json") or b"")["step"] != step:
                return f"{name}/run.json is of another step"
        except ValueError:
            return f"{name} has DONE, but not its run.json"
    newest = max(steps_of(tree), default=0)
    saved = max((int(mark[1:]) for mark in marks if mark[1:].isdigit()), default=0)
    if newest < saved:
        return f"the newest checkpoint is of step {newest}, but step {saved} had been saved"
    if log_of(tree)[:newest] != log_of(whole)[:newest]:
        return f"the log lacks lines of the {newest} steps in the newest checkpoint"
    return ""


def wrong_end(tree: Tree, whole: Tree) -> str:
    """What is wrong with a run that was stopped, resumed and ended."""
    kept = [path for path in whole if path.startswith(f"step_{STEPS:06d}/") and path.endswith(".safetensors")]
    wrong = [path for path in [*kept, "sample.txt", "main.log"] if tree.get(path) != whole[path]]
    pairs = zip_longest(log_of(tree), log_of(whole))
    wrong += [f"log.jsonl: {mine!r} for {theirs!r}" for mine, theirs in pairs if mine != theirs][:1]
    wrong += [path for path in ("report.html", "run.json", "config.json") if not tree.get(path)]
    return f"differs: {', '.join(wrong)}" if wrong else ""


def models(tree: Tree, name: str) -> Tree:
    """The files of the model with this name, and of its tokenizer; the time at which it was converted is left out."""
    stem = name.removesuffix(".bin")
    return {path: x for path, x in tree.items() if path.split("/")[0] in (name, f"{stem}_tokenizer.bin")}


def wrong_model(found: Tree, whole: list[Tree]) -> str:
    """ "" if every file is of one of the whole models, none is missing, and a folder is all of one."""
    if found in whole:
        return ""
    if "model" in found:
        return f"not a whole model: {differences(found, whole[-1])}"
    lost = [path for path in whole[-1] if found.get(path) not in [w[path] for w in whole]]
    return f"no whole {', '.join(lost)}" if lost else ""


def differences(found: Tree, whole: Tree) -> str:
    wrong = sorted(path for path in found.keys() | whole.keys() if found.get(path, 0) != whole.get(path, 0))
    return f"differs: {', '.join(wrong[:5])}" if wrong else ""
