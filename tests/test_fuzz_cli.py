"""Damaged files and odd command lines end with exit code 0, or 2 and one line. `python tests/fuzz.py` takes longer."""

import contextlib
import json
import os
import shutil
import tempfile
import traceback
from pathlib import Path

import fuzz
import pytest
from mutations import ODD

import handgrad

READER, LINE = 20, 40  # inputs per damaged file and per command line; the long run takes some hundred of each
NOBODY = 65534


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        folder = tmp_path_factory.mktemp("fuzz")
        fuzz.build(folder / "healthy")
        yield fuzz.World(folder / "healthy", folder / "world")


def is_right(problem):
    assert problem is None, f"{problem.kind}\n{problem.shown}"


@pytest.mark.parametrize("reader", fuzz.READERS, ids=lambda reader: reader.name)
def test_a_healthy_file_is_read(world, reader, capsys):
    if "parquet" in reader.argv:
        pytest.importorskip("pyarrow")
    with contextlib.chdir(world.folder):
        code = fuzz.main(reader.argv.split())
    changed = [path for path in world.restore() if not (reader.writes and path.startswith(reader.writes))]
    assert code == 0 and not changed, capsys.readouterr().err


@pytest.mark.parametrize("name", [reader.name for reader in fuzz.READERS])
def test_a_damaged_file_ends_in_one_line(world, name):
    strategy, judge = next((s, j) for other, s, j in fuzz.entries(world) if other == name)
    fuzz.fuzzed(strategy, judge, READER, is_right)


@pytest.mark.parametrize("name", [*(f"argv {name}" for name in fuzz.BASES), "argv of any verb"])
def test_an_odd_command_line_ends_in_one_line(world, name):
    strategy, judge = next((s, j) for other, s, j in fuzz.entries(world) if other == name)
    fuzz.fuzzed(strategy, judge, LINE, is_right)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.kind.strip("/").replace("/", "-"))
def test_what_is_no_file_ends_in_one_line(world, odd):
    wrong = [problem for reader in fuzz.READERS if (problem := fuzz.damaged(world, reader, odd))]
    assert not wrong, "\n\n".join(f"{problem.kind}\n{problem.shown}" for problem in wrong)


# other users' files ---------------------------------------------------------------------------------------------------


def as_nobody(work):
    """What `work` returns in a process that may not read and write everything; root may."""
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(NOBODY)
                    os.setuid(NOBODY)
                answer.write(json.dumps(work()))
            except BaseException:
                traceback.print_exc(file=answer)
            finally:
                answer.flush()
                os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        text = answer.read()
        assert text.startswith("["), text  # else a traceback
        return json.loads(text)


def is_open_to_all(path):
    """Whether another user may read what lies in a folder."""
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))


@pytest.fixture
def foreign(world):
    """A copy of the healthy files outside of pytest's folders, which no other user may enter; nobody's if this is root."""
    if os.getuid() == 0 and not is_open_to_all(Path(handgrad.__file__).parent):
        pytest.skip("another user may not read the package itself")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    copy = Path(shutil.copytree(world.healthy, folder / "files"))
    for path in (copy, *copy.rglob("*")):
        if os.getuid() == 0:
            os.chown(path, NOBODY, NOBODY)
    yield copy
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_files_that_may_not_be_read_end_in_one_line(foreign):
    def work():
        os.chdir(foreign)
        found = []
        for reader in fuzz.READERS:
            os.chmod(reader.file, 0)
            found.append((reader.name, *fuzz.command(reader.argv.split())))
            if os.path.exists(reader.file):  # an unfinished build may be begun anew
                os.chmod(reader.file, 0o644)
            for made in ("out", "out.bin", "out_tokenizer.bin", "out.html", "out.json"):
                fuzz.remove(Path(made))
        return found

    found = as_nobody(work)
    assert not [problem for problem in found if problem[1]]
    said = {name: text for name, _, text in found}
    assert "Permission denied" in said["train shard"] and "Permission denied" in said["report log.jsonl"]


def test_folders_that_may_not_be_written_end_in_one_line(foreign):
    def work():
        os.chdir(foreign)
        return [(reader.name, *fuzz.command(reader.argv.split())) for reader in fuzz.READERS]

    for path in (foreign, *foreign.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    found = as_nobody(work)
    assert not [problem for problem in found if problem[1]]
    said = {name: text for name, _, text in found}
    assert "cannot be written" in said["train shard"] and "cannot be written" in said["resume state"]


# the judge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "wrong"),
    [
        (lambda: 1 / 0, "ZeroDivisionError in ?"),
        (lambda: 3, "exit code 3"),
        (lambda: print("two\nlines", file=fuzz.sys.stderr) or 2, "exit code 2 without its one line"),
        (lambda: print("Traceback (most recent ...", file=fuzz.sys.stderr) or 0, "a traceback in stderr"),
        (lambda: len(b"1" * (2**30 + 2**29)) * 0, "more than 1 GiB of memory"),
        (lambda: print("[data] one line", file=fuzz.sys.stderr) or 2, ""),
        (lambda: 0, ""),
    ],
    ids=["exception", "code", "two lines", "traceback", "memory", "one line", "success"],
)
def test_what_is_wrong_is_noticed(monkeypatch, does, wrong):
    monkeypatch.setattr(fuzz, "main", lambda argv: does())
    assert fuzz.command([])[0] == wrong


def test_a_command_without_end_and_a_changed_input_are_noticed(monkeypatch, world):
    def spin():
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    monkeypatch.setattr(fuzz, "main", lambda argv: spin())
    assert fuzz.command([])[0].startswith("Hangs")
    monkeypatch.setattr(fuzz, "main", lambda argv: Path("text.txt").write_text("other") * 0)
    reader = next(reader for reader in fuzz.READERS if reader.name == "report sample")
    assert fuzz.damaged(world, reader, bytes.upper).kind == "report: changed its inputs: text.txt"
    assert (world.folder / "text.txt").read_bytes() == (world.healthy / "text.txt").read_bytes()
