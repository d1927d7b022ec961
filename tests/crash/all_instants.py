"""Stops commands by a kill or a power cut in front of every call that changes their files; says what is not restored.

    python tests/crash/all_instants.py                      every scenario, every state
    python tests/crash/all_instants.py train --repeats 20   a sample, as in the tests

A command runs once under powercut.c. Its journal gives the states that a kill or a power cut in front of any call may
leave (replay.py). Every state is checked as it is; then, in all different states or in --repeats of them, the command
is repeated, and its end is compared with that of a command that nothing stopped. --kills really kills the command
in front of that many calls, half of a write done, and compares what is left with the replayed journal.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from replay import Call, Disk, Tree, below, calls, cuts, grow, harvest, plant

import handgrad.cli.train  # noqa: F401  here, not in every fork
from handgrad.cli.__main__ import main as handgrad

STEPS = 6
TRAIN = (
    "--model.num-layers 1 --model.num-heads 1 --model.hidden-size 16 --model.max-seq-len 16 --model.dropout 0.1 "
    "--run.micro-batch 2 --run.threads 1 --run.val-every 2 --run.val-tokens 32 --run.sample-every 3 "
    f"--run.sample-tokens 4 --run.save-every 2 --run.resume auto --run.steps {STEPS}"
).split()
TIMES = ("seconds", "tokens_per_second", "mfu")
# the command under powercut.c marks in the journal when a save and when the verb have returned
MARKED = """
import os, sys
from handgrad.io import checkpoint
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


def record(tool: Path, where: Path, scenario: Scenario, mutant: Path | None, kill: int = 0) -> tuple[Disk, list[Call]]:
    """(disk/ as it was, the calls) of the scenario's command, killed in front of call number `kill` if that is not 0."""
    plant(scenario.before, where / "disk")
    disk, journal = Disk(grow(where / "disk")), where / "journal"
    path = [str(mutant)] if mutant else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, *sys.path])}
    words = [tool, "disk", journal, str(kill), "1", sys.executable, "-c", MARKED, *scenario.argv]
    ended = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True)
    if ended.returncode == 77:
        raise SystemExit("ptrace is forbidden here")
    if ended.returncode != (137 if kill else 0):
        raise SystemExit(f"the recorded command ended with {ended.returncode}: {ended.stderr[-500:]}")
    return disk, calls(journal)


# scenarios ------------------------------------------------------------------------------------------------------------


def train(tool: Path, work: Path) -> Scenario:
    """A run from its first step to its last."""
    argv = ["train", *TRAIN, "--data.train", str(data(work)), "--run.out", "disk/run"]
    whole = below(done(work / "whole", {}, [*argv, "--run.keep-last", "0"]), "run")  # every checkpoint
    return Scenario(
        [*argv, "--run.keep-last", "2"],
        {},
        lambda tree, marks: wrong_run(below(tree, "run"), marks, whole),
        lambda tree: wrong_end(below(tree, "run"), whole),
    )


def resume(tool: Path, work: Path) -> Scenario:
    """The same run, killed once already, when it had just saved step 4."""
    fresh = train(tool, work)
    disk, found = record(tool, work / "first", fresh, None)
    for call in found[: [str(call) for call in found].index("mark ./:4")]:
        disk.do(call)
    _, tree = next(cuts(disk, random.Random(0), 0))
    return replace(fresh, before=tree)


def convert(tool: Path, work: Path, to: str) -> Scenario:
    """A model over an older one of its kind, under the same name."""
    argv = ["train", *TRAIN, "--data.train", str(data(work)), "--run.out"]
    for name, seed in (("old", "1"), ("new", "2")):
        run(work, [*argv, name, "--run.seed", seed])
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
        if ":returned" in marks and found != whole[0]:
            return "the finished folder is not on disk"
        if "meta.json" not in found:
            return ""
        fitting = [w for w in whole if all(found.get(path) == content for path, content in w.items())]
        return "" if fitting else "meta.json describes other shards than there are"

    return Scenario(argv, before, check, lambda tree: differences(below(tree, "data"), whole[0]))


def report(tool: Path, work: Path) -> Scenario:
    """The page of a run, over an older one."""
    argv = ["train", *TRAIN, "--data.train", str(data(work)), "--run.out", "disk/run"]
    before = done(work / "before", {}, argv) | {"run/report.html": b"an older page"}
    after = done(work / "after", before, ["report", "disk/run"])
    pages = [before["run/report.html"], after["run/report.html"]]

    def check(tree: Tree, marks: set[str]) -> str:
        rest = {path for path in before if tree.get(path, b"") != before[path]} - {"run/report.html"}
        if rest:
            return f"changed: {', '.join(rest)}"
        return "" if tree.get("run/report.html") in pages[":returned" in marks :] else "no page, or half of one"

    return Scenario(["report", "disk/run"], before, check, lambda tree: differences(tree, after))


SCENARIOS: dict[str, Callable[[Path, Path], Scenario]] = {
    "train": train,
    "resume": resume,
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
    """The whole lines of log.jsonl, without the times."""
    found = []
    for row in (tree.get("log.jsonl") or b"").split(b"\n")[:-1]:
        try:
            found.append(json.dumps({key: x for key, x in json.loads(row).items() if key not in TIMES}).encode())
        except ValueError:
            found.append(row)
    return found


def steps_of(tree: Tree) -> dict[int, str]:
    """step: folder, of the checkpoints that say they are complete."""
    found = {path.split("/")[0] for path in tree if path.endswith("/DONE") and path.startswith("step_")}
    names = sorted((name for name in found if re.fullmatch(r"step_\d{6}(\.old)?", name)), reverse=True)
    return {int(name[5:11]): name for name in names}


def wrong_run(tree: Tree, marks: set[str], whole: Tree) -> str:
    """What is wrong with a run folder that something stopped."""
    for step, name in steps_of(tree).items():
        for file in ("model.safetensors", "state.rank00.safetensors"):
            if tree.get(f"{name}/{file}") != whole[f"step_{step:06d}/{file}"]:
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
    kept = [f"step_{STEPS:06d}/model.safetensors", f"step_{STEPS:06d}/state.rank00.safetensors", "sample.txt"]
    wrong = [path for path in [*kept, "main.log"] if tree.get(path) != whole[path]]
    wrong += ["log.jsonl"] if log_of(tree) != log_of(whole) else []
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


# instants -------------------------------------------------------------------------------------------------------------


def digest(tree: Tree) -> bytes:
    """Two trees with one digest are one state; the process's number in temporary names does not count."""
    h = hashlib.sha256()
    for path, content in sorted(tree.items()):
        h.update(repr((re.sub(r"tmp-?\w+$", "tmp", path), content)).encode())
    return h.digest()


def states(disk: Disk, found: list[Call], rng: random.Random, mixtures: int):
    """(instant, marks so far, tree) for all that a kill or a power cut may leave, in order."""
    marks: set[str] = set()
    for number in range(len(found) + 1):
        for name, tree in cuts(disk, rng, mixtures):
            yield f"call {number + 1} ({found[number] if number < len(found) else 'none'}), {name}", set(marks), tree
        if number < len(found):
            disk.do(found[number])
            if found[number].words[0] == "mark":
                marks.add(found[number].words[1][2:])


def repeat(work: Path, scenario: Scenario, tree: Tree) -> str:
    """What is wrong once the command has been repeated in a state, or ""."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        plant(tree, Path(folder) / "disk")
        return run(Path(folder), scenario.argv) or scenario.end(harvest(Path(folder) / "disk"))


def examine(tool: Path, work: Path, name: str, a: argparse.Namespace) -> list[tuple[str, str]]:
    """Stops one scenario at every instant; prints a line of figures; returns (what went wrong, when) for each time."""
    rng, begin = random.Random(a.seed), time.perf_counter()
    scenario = SCENARIOS[name](tool, work)
    disk, found = record(tool, work / "recorded", scenario, a.mutant)
    wrong, different, count = [], {}, 0
    for instant, marks, tree in states(disk, found, rng, a.mixtures):
        count += 1
        key = digest(tree)
        problem = scenario.check(tree, marks)
        if problem:
            wrong.append((f"{name}: {problem}", instant))
        different.setdefault(key, (instant, tree))
    if tree_now(disk) != harvest(work / "recorded" / "disk"):
        wrong.append((f"{name}: the journal does not give the folder that the command left", "the end"))
    chosen = list(different.values())
    if a.repeats < len(chosen):
        chosen = rng.sample(chosen, a.repeats)
    for instant, tree in chosen:
        problem = repeat(work, scenario, tree)
        if problem:
            wrong.append((f"{name}: repeated: {problem}", instant))
    number = sum(call.words[0] != "mark" for call in found)
    kills = rng.sample(range(1, number + 1), min(a.kills, number))
    for kill in kills:
        where = work / f"killed_{kill}"
        disk, found = record(tool, where, scenario, a.mutant, kill)
        for call in found:
            disk.do(call)
        left = harvest(where / "disk")
        marks = {call.words[1][2:] for call in found if call.words[0] == "mark"}
        problem = "" if tree_now(disk) == left else "the replayed journal differs from what the kill left"
        problem = problem or scenario.check(left, marks) or repeat(work, scenario, left)
        if problem:
            wrong.append((f"{name}: really killed: {problem}", f"call {kill}"))
    print(
        f"{name}: {number} calls, {count} states, {len(different)} different, {len(chosen)} repeated, {len(kills)} real"
        f" kills, {len(wrong)} wrong, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    return wrong


def tree_now(disk: Disk) -> Tree:
    """What is there if nothing is lost."""
    return dict(sorted(next(cuts(disk, random.Random(0), 0))[1].items()))


def main() -> int:
    """Returns 0 if every command was restored from every state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; none: all")
    parser.add_argument("--repeats", type=int, default=10**9, help="states in which the command is repeated")
    parser.add_argument("--mixtures", type=int, default=3, help="random losses of each kind at every call")
    parser.add_argument("--kills", type=int, default=20, help="real kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutant", type=Path, help="folder of a sitecustomize.py that spoils the recorded command")
    a = parser.parse_args()
    print(f"date {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    wrong: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder) / "powercut"
        source = Path(__file__).with_name("powercut.c")
        built = subprocess.run(["cc", "-O1", "-o", tool, source], capture_output=True, text=True)
        if built.returncode:
            raise SystemExit(f"no C compiler made powercut.c: {built.stderr}")
        for name in a.scenarios or SCENARIOS:
            (work := Path(folder) / name).mkdir()
            wrong += examine(tool, work, name, a)
    times = Counter(problem for problem, _ in wrong)
    for problem, instant in dict(reversed(wrong)).items():  # the first instant of each
        print(f"{times[problem]} x {problem}; first at {instant}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
