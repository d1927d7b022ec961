"""Atomic writes: the old file or the new one, never a part, and no temporary file is left behind."""

import os

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


def test_the_names_of_made_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(disk, "flush", flushed.append)
    disk.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and sorted(flushed) == [tmp_path, tmp_path / "a"]
    disk.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
