"""Atomic writes: the old file or the new one, never a part, and no temporary file is left behind."""

import os
import stat
import threading
from io import FileIO
from pathlib import Path

import pytest

from handgrad.core import disk
from handgrad.core.errors import HandgradError


def test_a_text_replaces_the_file(tmp_path):
    path = tmp_path / "a.txt"
    disk.write_text(path, "old")
    disk.write_text(path, "néw \ud800")
    assert path.read_text(encoding="utf-8") == "néw ?" and os.listdir(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """Fails if the content is written under the file's own name."""
    path = tmp_path / "a.txt"
    disk.write_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(HandgradError, match=r"\[disk\] .*a.txt must be writable, but got No space left on device"):
        disk.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_pipe_or_a_device_is_written_as_it_is(tmp_path):
    """A report to /dev/stdout or to <(...) must not replace the device by a file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        found = []
        reader = threading.Thread(
            target=lambda at=name, into=found: into.append((tmp_path / at).read_bytes()), daemon=True
        )
        reader.start()
        disk.write_text(tmp_path / name, "text")
        reader.join(10)
        assert found == [b"text"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and (tmp_path / "link").is_symlink()
    disk.write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("old")
    (tmp_path / "link").symlink_to("other/a.txt")
    disk.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other" / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "other"] and os.listdir(tmp_path / "other") == ["a.txt"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(HandgradError, match="must be writable, but got Is a directory"):
        disk.write_text(tmp_path, "text")


DEAD = 2**22 + 1  # above any process's number


def test_sweep_deletes_what_dead_processes_left(tmp_path):
    alive, own = os.getppid(), os.getpid()
    gone = [
        f".a.txt.tmp-{DEAD}",
        f"step_000001.tmp-{DEAD}",
        f".a.tmp-{own}",
        f".b.tmp-{'9' * 30}",
    ]
    stay = [f".a.txt.tmp-{alive}", "a.tmp-x", "a.old", ".a.tmp-", "tmp-1", f"a.tmp-{DEAD}.txt", "step_000001.old"]
    stay.append(f"shards.old-{DEAD}")  # core/replace.py gives it its name back
    for name in (*gone, *stay):
        (tmp_path / name).write_text("half")
    (tmp_path / gone[1]).unlink()
    (tmp_path / gone[1]).mkdir()
    (tmp_path / gone[1] / "part").write_text("half")
    (tmp_path / f"link.tmp-{DEAD}").symlink_to(tmp_path.parent)
    disk.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(stay) and tmp_path.parent.exists()


def test_sweep_under_a_lock_asks_nobody(tmp_path):
    for name in (f".step_1.tmp-{os.getppid()}", f"step_1.tmp-{os.getppid()}", f".other.tmp-{os.getppid()}"):
        (tmp_path / name).mkdir()
    disk.sweep(tmp_path, r"step_\d+", is_locked=True)
    assert os.listdir(tmp_path) == [f".other.tmp-{os.getppid()}"]


def test_temporary_names_are_swept():
    """The rule that names them and the rule that finds them are one."""
    match = disk._TEMPORARY.fullmatch(disk.temporary(Path("x/step_000001")).name)
    assert match.groups() == ("step_000001", str(os.getpid()))


def test_append_writes_all_or_nothing(tmp_path):
    class Short(FileIO):
        left = 11

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            count = super().write(bytes(data[: min(3, self.left)]))
            self.left -= count
            return count

    with Short(tmp_path / "a", "ab") as file:
        disk.append(file, b"0123456789")
        with pytest.raises(OSError, match="No space"):
            disk.append(file, b"0123456789")
        file.left = 99
        disk.append(file, b"abcdef")
    assert (tmp_path / "a").read_bytes() == b"0123456789abcdef"


def test_the_names_of_made_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(disk, "flush", flushed.append)
    disk.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and sorted(flushed) == [tmp_path, tmp_path / "a"]
    disk.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


@pytest.mark.parametrize("name", ["a\0b", "x" * 400])
def test_names_that_cannot_be_are_one_line(tmp_path, name):
    with pytest.raises(HandgradError, match=r"^\[disk\] .* must be writable, but got"):
        disk.write_text(tmp_path / name, "text")


def test_a_pipe_that_nobody_reads_is_an_error(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(disk, "PIPE_SECONDS", 0.0)
    with pytest.raises(HandgradError, match="pipe must be writable, but got No such device or address"):
        disk.write_text(tmp_path / "pipe", "text")
