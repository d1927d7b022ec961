"""What a folder holds after a kill or a power cut in front of any call of a journal that powercut.c wrote.

A kill leaves all that was done. A power cut leaves what was flushed, and any part of the rest: the bytes of a file
since its last fsync, and the names in a folder (made, linked, renamed, removed) since the folder's last fsync. A rename
keeps both its names or neither, and so does an exchange.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

Tree = dict[str, bytes | None]  # path below the folder: the bytes of a file, None for a folder


@dataclass
class File:
    """Bytes as of the last fsync, and as they are; `steps`: how they were after each call between."""

    stable: bytes = b""
    steps: list[bytes] = field(default_factory=list)

    @property
    def now(self) -> bytes:
        return self.steps[-1] if self.steps else self.stable

    def flush(self) -> None:
        self.stable, self.steps = self.now, []


@dataclass
class Folder:
    """Names as of the last fsync, and as they are; `changes`: (number, name, what it names or None) between."""

    stable: dict[str, "File | Folder"] = field(default_factory=dict)
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    changes: list[tuple[int, str, "File | Folder | None"]] = field(default_factory=list)

    def set(self, number: int, name: str, node: "File | Folder | None") -> None:
        self.changes.append((number, name, node))
        apply(self.now, name, node)

    def flush(self) -> None:
        self.stable, self.changes = dict(self.now), []


def apply(names: dict, name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def grow(folder: Path) -> Folder:
    """The folder on disk, all of it flushed."""
    names = {p.name: grow(p) if p.is_dir() else File(p.read_bytes()) for p in folder.iterdir()}
    return Folder(names, dict(names))


@dataclass(frozen=True)
class Call:
    """A line of a journal: its words, and the bytes of a write."""

    words: list[str]
    data: bytes = b""

    def __str__(self) -> str:
        return " ".join(self.words)


def calls(journal: Path) -> list[Call]:
    """The calls of a journal, marks included. Raises ValueError for one that replay does not know."""
    raw, at, found = journal.read_bytes(), 0, []
    while at < len(raw):
        end = raw.index(b"\n", at)
        words, at = raw[at:end].decode().split(" "), end + 1
        if words[0] == "unknown":
            raise ValueError(f"system call {words[1]} on {words[2]} has no model")
        data = raw[at : at + int(words[2])] if words[0] == "write" else b""
        at += len(data) + 1 if words[0] == "write" else 0
        found.append(Call(words, data))
    return found


class Disk:
    """A folder to which calls are applied in order."""

    def __init__(self, root: Folder):
        self.root, self.number = root, 0

    def find(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for name in split(path):
            assert isinstance(node, Folder)
            node = node.now[name]
        return node

    def parent(self, path: str) -> tuple[Folder, str]:
        *folders, name = split(path)
        node = self.find("/".join([".", *folders]))
        assert isinstance(node, Folder)
        return node, name

    def do(self, call: Call) -> None:
        kind, *sizes = call.words
        path = sizes.pop()
        self.number += 1
        if kind in ("rename", "exchange"):
            (to, new), (source, old) = self.parent(path), self.parent(sizes.pop())
            node, other = source.now[old], to.now.get(new) if kind == "exchange" else None
            source.set(self.number, old, other)
            to.set(self.number, new, node)
        elif kind == "link":  # both names lead to one file, whose bytes survive or are lost for both
            to, new = self.parent(path)
            to.set(self.number, new, self.find(sizes.pop()))
        elif kind in ("create", "mkdir", "unlink", "rmdir"):
            folder, name = self.parent(path)
            folder.set(self.number, name, {"create": File, "mkdir": Folder}.get(kind, lambda: None)())
        elif kind == "fsync":
            self.find(path).flush()
        elif kind in ("write", "truncate"):
            file = self.find(path)
            assert isinstance(file, File)
            size = int(sizes[0])
            if kind == "write":
                file.steps.append(file.now[:size].ljust(size, b"\0") + call.data + file.now[size + len(call.data) :])
            else:
                file.steps.append(file.now[:size].ljust(size, b"\0"))
        else:
            assert kind == "mark", call


def split(path: str) -> list[str]:
    return [unquote(name, errors="surrogateescape") for name in path.split("/")[1:]]


def survivor(root: Folder, keeps: Callable[[int], bool], content: Callable[[File], bytes]) -> Tree:
    """The tree if a change of names survives where `keeps` its number, and a file holds `content` of it."""
    tree: Tree = {}

    def walk(folder: Folder, prefix: str) -> None:
        names = dict(folder.stable)
        for number, name, node in folder.changes:
            if keeps(number):
                apply(names, name, node)
        for name, node in names.items():
            tree[prefix + name] = None if isinstance(node, Folder) else content(node)
            if isinstance(node, Folder):
                walk(node, f"{prefix}{name}/")

    walk(root, "")
    return tree


def torn(file: File, rng: random.Random) -> bytes:
    """One of the things that may be left of a file. What was flushed and not touched since is never lost."""
    if not file.steps:
        return file.stable
    versions = [file.stable, *file.steps]
    before, now = versions[-2:]
    whole = min(map(len, versions))  # bytes that were there all the time
    first = len(file.steps[0])
    some = rng.randint(min(len(before), len(now)), max(len(before), len(now)))
    zeros = now[:whole].ljust(len(now), b"\0")  # the size without the bytes
    hole = zeros[:first] + now[first:]  # the first call's bytes lost, the later ones kept
    return rng.choice([file.stable, now, rng.choice(file.steps), now[:some], zeros, hole])


def cuts(disk: Disk, rng: random.Random, count: int) -> Iterator[tuple[str, Tree]]:
    """(name, tree) of what a power cut now may leave: four extremes, then `count` mixtures of each of two kinds.

    "ordered": names survive up to some call and not beyond, as with a journal; "free": each for itself, as POSIX allows.
    """
    yield "kept", survivor(disk.root, lambda _: True, lambda f: f.now)
    yield "lost", survivor(disk.root, lambda _: False, lambda f: f.stable)
    yield "names kept, bytes lost", survivor(disk.root, lambda _: True, lambda f: f.stable)
    yield "bytes kept, names lost", survivor(disk.root, lambda _: False, lambda f: f.now)
    for _ in range(count):
        last, seed = rng.randint(max(disk.number - 30, 0), disk.number), rng.random()
        yield "ordered", survivor(disk.root, lambda n, last=last: n <= last, lambda f: torn(f, rng))
        yield (
            "free",
            survivor(disk.root, lambda n, seed=seed: random.Random(seed + n).random() < 0.5, lambda f: torn(f, rng)),
        )


def plant(tree: Tree, folder: Path) -> None:
    """Makes a folder hold a tree."""
    folder.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def harvest(folder: Path) -> Tree:
    """The tree that a folder holds."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def below(tree: Tree, name: str) -> Tree:
    """The part of a tree in one of its folders."""
    return {path[len(name) + 1 :]: content for path, content in tree.items() if path.startswith(f"{name}/")}
