"""Whatever the instant of a kill or a power cut, nothing that a command had finished is lost, and the same command
repeated ends as if nothing had happened. `python tests/crash/all_instants.py` takes every state, this file a sample."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALL = Path(__file__).with_name("all_instants.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ptrace is Linux's"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for powercut.c"),
]


def stopped(*words):
    """(exit code, what all_instants.py prints) of a sample of instants."""
    command = [sys.executable, str(ALL), *map(str, words)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if "ptrace is forbidden here" in ended.stderr:
        pytest.skip("ptrace is forbidden here")
    assert not ended.stderr, ended.stderr
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(
    ("scenarios", "repeats", "kills"),
    [
        (["train"], 25, 3),
        (["resume"], 8, 1),
        (["lora", "lora-resume"], 5, 1),
        (["convert-hf", "convert-llmc", "convert-handgrad"], 6, 1),
        (["data-text", "data-replace"], 8, 1),
        (["report"], 3, 1),
    ],
    ids=["train", "resume", "lora", "convert", "data", "report"],
)
def test_every_state_that_a_kill_or_a_power_cut_leaves_is_restored(scenarios, repeats, kills):
    code, out = stopped(*scenarios, "--repeats", repeats, "--kills", kills, "--mixtures", 1)
    assert code == 0, out
    assert len(re.findall(r"[1-9]\d* calls, .* 0 wrong", out)) == len(scenarios)


@pytest.mark.parametrize(
    ("mutant", "scenarios", "problem"),
    [
        ("model_is_not_flushed", ["train"], "has DONE, but not its model.safetensors; .*, names kept, bytes lost"),
        ("frozen_is_not_flushed", ["lora"], "has DONE, but not its frozen.safetensors; .*, names kept, bytes lost"),
        ("links_are_not_flushed", ["lora"], "has DONE, but not its frozen.safetensors; .*, free"),
        ("log_is_not_flushed", ["train"], "the log lacks lines of the 2 steps .*, names kept, bytes lost"),
        ("flushed_after_the_rename", ["train"], "has DONE, but not its .*, names kept, bytes lost"),
        ("done_before_the_files", ["train"], "has DONE, but not its model.safetensors; .*, kept"),
        ("the_older_ones_first", ["train"], "the newest checkpoint is of step 0, but step 2 .*"),
        ("nothing_is_flushed", ["report"], "report: no page, or half of one; .*, names kept, bytes lost"),
        ("copied_not_renamed", ["report"], "report: no page, or half of one; .*, kept"),
        ("nothing_is_flushed", ["data-text"], "the finished folder is not on disk"),
        ("copied_not_renamed", ["data-text"], "meta.json describes other shards .*, kept"),
        ("nothing_is_flushed", ["convert-llmc"], "no whole model.bin.*, names kept, bytes lost"),
        ("copied_not_renamed", ["convert-llmc"], "no whole model.bin; .*, kept"),
    ],
)
def test_a_careless_writer_is_noticed(mutant, scenarios, problem):
    code, out = stopped(*scenarios, "--repeats", 0, "--kills", 0, "--mixtures", 1, "--mutant", mutant)
    assert code == 1 and re.search(problem, out), out


# the model of losses --------------------------------------------------------------------------------------------------


@pytest.fixture
def replay(monkeypatch):
    monkeypatch.syspath_prepend(str(ALL.parent))
    return pytest.importorskip("replay")


def cut(replay, lines):
    """Every tree that a power cut may leave after some calls on an empty folder."""
    disk = replay.Disk(replay.Folder())
    for line, data in lines:
        disk.do(replay.Call(line.split(), data))
    return {name: tree for name, tree in replay.cuts(disk, random.Random(0), 0)}


def test_what_is_not_flushed_may_be_lost(replay):
    made = [("create ./a", b""), ("write 0 3 ./a", b"new")]
    assert cut(replay, made) == {
        "kept": {"a": b"new"},
        "lost": {},
        "names kept, bytes lost": {"a": b""},
        "bytes kept, names lost": {},
    }
    assert cut(replay, [*made, ("fsync ./a", b"")])["names kept, bytes lost"] == {"a": b"new"}
    assert cut(replay, [*made, ("fsync .", b"")])["bytes kept, names lost"] == {"a": b"new"}
    assert cut(replay, [*made, ("fsync .", b"")])["lost"] == {"a": b""}


def test_a_rename_survives_with_both_names_or_with_neither(replay):
    calls = [("create ./old", b""), ("fsync .", b""), ("rename ./old ./new", b"")]
    disk = replay.Disk(replay.Folder())
    for line, data in calls:
        disk.do(replay.Call(line.split(), data))
    left = {tuple(tree) for _, tree in replay.cuts(disk, random.Random(0), 50)}
    assert left == {("old",), ("new",)}


def test_two_names_of_a_file_share_its_bytes_and_survive_one_by_one(replay):
    made = [("create ./a", b""), ("write 0 3 ./a", b"new"), ("fsync .", b""), ("link ./a ./b", b"")]
    assert cut(replay, made) == {
        "kept": {"a": b"new", "b": b"new"},
        "lost": {"a": b""},
        "names kept, bytes lost": {"a": b"", "b": b""},
        "bytes kept, names lost": {"a": b"new"},
    }
    assert cut(replay, [*made, ("fsync ./b", b"")])["lost"] == {"a": b"new"}


def test_an_exchange_survives_whole_or_not_at_all(replay):
    disk = replay.Disk(replay.Folder())
    for line, data in [
        ("create ./a", b""),
        ("write 0 1 ./a", b"1"),
        ("fsync ./a", b""),
        ("create ./b", b""),
        ("fsync .", b""),
    ]:
        disk.do(replay.Call(line.split(), data))
    disk.do(replay.Call(["exchange", "./a", "./b"]))
    left = [tree for _, tree in replay.cuts(disk, random.Random(0), 50)]
    assert all(tree in ({"a": b"1", "b": b""}, {"a": b"", "b": b"1"}) for tree in left) and left[0] != left[1]


def test_flushed_bytes_survive_whatever_is_appended(replay):
    rng = random.Random(0)
    file = replay.File(b"one", [b"onetwo", b"onetwothree"])
    left = {replay.torn(file, rng) for _ in range(300)}
    assert all(content.startswith(b"one") for content in left)
    assert {b"one", b"onetwothree", b"one" + bytes(8), b"one\0\0\0three", b"onetwo"} <= left
