"""The cache of compiled kernels: a folder that cannot be written costs time and one line, and never a run."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from handgrad.backends.cuda import cache


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test is a process that has warned of nothing and has no folder of its own."""
    monkeypatch.setattr(cache, "_OWN", [])
    cache._warn.cache_clear()


def test_a_writable_cache_keeps_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HANDGRAD_CACHE", str(tmp_path / "new" / "folder"))
    assert cache.load("a") is None
    cache.store("a", b"cubin")
    assert cache.load("a") == b"cubin" and cache.writable() == cache.folder() == tmp_path / "new" / "folder"
    assert [p.name for p in cache.folder().iterdir()] == ["a"]  # no temporary file, no probe
    assert capsys.readouterr().err == "" and not cache._OWN


def spoil(how, tmp_path, monkeypatch):
    """A cache that cannot be written."""
    place = tmp_path / "cache"
    monkeypatch.setenv("HANDGRAD_CACHE", str(place))
    if how == "a file in its place":
        place.write_text("x")
    elif how == "a file above it":
        place.write_text("x")
        monkeypatch.setenv("HANDGRAD_CACHE", str(place / "inside"))
    elif how == "a name that is too long":
        monkeypatch.setenv("HANDGRAD_CACHE", str(tmp_path / ("x" * 300)))
    elif how == "no home folder":
        for name in ("HANDGRAD_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        number = {"a read-only file system": errno.EROFS, "no permission": errno.EACCES, "a full disk": errno.ENOSPC}[
            how
        ]
        whole = cache.tempfile.mkstemp

        def mkstemp(*args, dir=None, **more):
            if Path(dir) == place:
                raise OSError(number, "as said")
            return whole(*args, dir=dir, **more)

        monkeypatch.setattr(cache.tempfile, "mkstemp", mkstemp)


HOWS = ["a file in its place", "a file above it", "a name that is too long", "no home folder"]
HOWS += ["a read-only file system", "no permission", "a full disk"]


@pytest.mark.parametrize("how", HOWS)
def test_a_cache_that_cannot_be_written_costs_one_line(how, tmp_path, monkeypatch, capsys):
    spoil(how, tmp_path, monkeypatch)
    for name in ("a", "b"):
        assert cache.load(name) is None
        cache.store(name, name.encode())
    assert (cache.load("a"), cache.load("b")) == (b"a", b"b")  # for this process
    place = cache.writable()
    assert place == cache._OWN[0] and place != cache.folder() and place.stat().st_mode & 0o777 == 0o700
    err = capsys.readouterr().err
    assert err.startswith("[cache] ") and err.count("\n") == 1 and "HANDGRAD_CACHE=FOLDER" in err


def test_what_a_read_only_cache_holds_is_read(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a").write_bytes(b"kept")
    spoil("a read-only file system", tmp_path, monkeypatch)
    cache.store("b", b"new")
    assert (cache.load("a"), cache.load("b")) == (b"kept", b"new")


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDGRAD_CACHE", str(tmp_path / "cache"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    cache.store("a", b"cubin")
    assert list((tmp_path / "cache").iterdir()) == [] and cache.load("a") is None


def test_cache_without_any_folder(tmp_path, monkeypatch):
    spoil("a file in its place", tmp_path, monkeypatch)

    def none(*args, **more):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", none)
    cache.store("a", b"cubin")
    assert cache.load("a") is None and cache.writable() is None


def test_the_processs_own_folder_ends_with_it(tmp_path):
    (tmp_path / "file").write_text("x")
    code = "from handgrad.backends.cuda import cache; cache.store('a', b'x'); print(cache._OWN[0])"
    env = {"HANDGRAD_CACHE": str(tmp_path / "file"), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout and not Path(done.stdout.strip()).exists() and done.stderr.count("\n") == 1
