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
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from replay import Call, Disk, Tree, cuts, harvest, plant
from scenarios import SCENARIOS, Scenario, record, run

# instants -------------------------------------------------------------------------------------------------------------


def digest(tree: Tree) -> bytes:
    """Two trees with one digest are one state; the process's number in temporary names does not count."""
    h = hashlib.sha256()
    for path, content in sorted(tree.items()):
        h.update(repr((re.sub(r"tmp-?\w+$", "tmp", path), content)).encode())
    return h.digest()


def states(disk: Disk, found: list[Call], rng: random.Random, mixtures: int) -> Iterator[tuple[str, set[str], Tree]]:
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
    parser.add_argument("--mutant", default="", help="function of mutants.py that spoils the recorded command")
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
