"""Hypothesis strategies that damage files: bytes, JSON values, lines, headers, and what lies under a name."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st


@st.composite
def mutations(draw, head: int):
    """A function bytes -> bytes that overwrites, flips, cuts, inserts and doubles within `head` of start or end."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["set", "flip", "cut", "insert", "delete", "double"]))
        edits.append((kind, draw(st.integers(0, head)), draw(st.binary(min_size=1, max_size=9)), draw(st.booleans())))

    def mutate(raw: bytes) -> bytes:
        for kind, place, new, from_end in edits:
            place = len(raw) - place if from_end else place
            place = min(max(place, 0), len(raw))
            before, after = raw[:place], raw[place:]
            if kind == "set":
                raw = before + new + after[len(new) :]
            elif kind == "flip" and after:
                raw = before + bytes([after[0] ^ (1 << new[0] % 8)]) + after[1:]
            elif kind == "cut":
                raw = before
            elif kind == "insert":
                raw = before + new + after
            elif kind == "delete":
                raw = before + after[len(new) :]
            elif kind == "double":
                raw = before + after[:64] + after
        return raw

    return mutate


# JSON -----------------------------------------------------------------------------------------------------------------

RAW = {  # what json.dumps would not write, by what stands for it
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 5000,
    "@half@": '"\\ud800"',
    "@text@": json.dumps("long " * 100_000),
}
NUMBERS = [0, -1, 1, 2, 2**31 - 1, 2**31, 2**32, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e308]
WORDS = ["", " ", "\0", "\n", "..", "/", "/dev/null", "/dev/zero", "*", "[", "nan", "True", "é", "\u2028", "x" * 300]


def json_values():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def odd_values():
    """Values of other types and sizes than a reader expects."""
    special = [float("nan"), float("inf"), -float("inf"), [], {}, [[]], [{}], {"": 0}, *RAW]
    return st.sampled_from([*NUMBERS, *WORDS, *special]) | json_values()


def places(value, found=None, path=()):
    """The path of every value inside a JSON value, its own first."""
    found = [] if found is None else found
    found.append(path)
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        places(inner, found, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def json_edits(draw):
    """A function that replaces, removes, moves, wraps and renames parts of a JSON value; bytes -> bytes."""
    kinds = ["replace", "replace", "replace", "delete", "rename", "swap", "wrap", "extend", "duplicate"]
    number = st.integers(0, 10**6)
    edits = [
        (draw(st.sampled_from(kinds)), draw(number), draw(number), draw(odd_values()))
        for _ in range(draw(st.integers(1, 3)))
    ]

    def edit(raw: bytes) -> bytes:
        try:
            box, doubled = [json.loads(raw)], []
        except ValueError:
            return raw
        for kind, first, second, new in edits:
            paths = places(box)[1:]
            *outer, key = paths[first % len(paths)]
            folder = at(box, outer)
            if kind == "replace":
                folder[key] = copy.deepcopy(new)
            elif kind == "delete" and outer:
                del folder[key]
            elif kind == "rename" and isinstance(folder, dict):
                folder[str(new)[:40]] = folder.pop(key)
            elif kind == "swap":
                folder[key] = copy.deepcopy(at(box, paths[second % len(paths)]))
            elif kind == "wrap":
                folder[key] = [folder[key]] if second % 2 else {"a": folder[key]}
            elif kind == "extend" and isinstance(folder, list) and outer:
                folder.append(copy.deepcopy(new))
            elif kind == "duplicate":
                doubled.append((str(key), new))
            if not places(box)[1:]:
                break
        text = json.dumps(box[0] if box else None)
        for key, new in doubled:
            text = text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(new)}, ", 1)
        for word, written in RAW.items():
            text = text.replace(json.dumps(word), written)
        return text.encode()

    return edit


# files ----------------------------------------------------------------------------------------------------------------


def json_line(edit, number):
    """A function that edits one line of JSON lines."""

    def change(raw):
        lines = raw.split(b"\n")
        lines[number % len(lines)] = edit(lines[number % len(lines)])
        return b"\n".join(lines)

    return change


def safetensors_header(edit):
    """A function that edits the JSON header of a safetensors file and keeps its length right."""

    def change(raw):
        size = int.from_bytes(raw[:8], "little")
        header = edit(raw[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + raw[8 + size :]

    return change


def int32_words(values):
    """A function that sets 32-bit words of a binary header."""

    def change(raw):
        raw = bytearray(raw)
        for place, value in values:
            if 4 * place + 4 <= len(raw):
                raw[4 * place : 4 * place + 4] = (value % 2**32).to_bytes(4, "little")
        return bytes(raw)

    return change


@dataclass(frozen=True)
class Odd:
    """What lies under a name instead of a file."""

    kind: str

    def put(self, path: Path) -> None:
        """Replaces a file."""
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "fifo":
            os.mkfifo(path)
        elif self.kind == "empty":
            path.touch()
        elif self.kind == "loop":
            path.symlink_to(path.name)
        elif self.kind != "missing":
            path.symlink_to(self.kind)


ODD = [Odd(k) for k in ("folder", "fifo", "empty", "loop", "missing", "nowhere", "/dev/null", "/dev/zero", "/dev/full")]


def remove(path: Path) -> None:
    """Removes whatever lies under a name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def changes(kind: str):
    """Functions bytes -> bytes, and what is no file, for a file of a kind: json, jsonl, safetensors, words or bytes."""
    at_bytes = mutations(head=300)
    special = {
        "json": json_edits(),
        "jsonl": st.builds(json_line, json_edits(), st.integers(0, 100)),
        "safetensors": st.builds(safetensors_header, json_edits()),
        "words": st.builds(
            int32_words,
            st.lists(
                st.tuples(st.integers(0, 12), st.sampled_from([x for x in NUMBERS if type(x) is int])),
                min_size=1,
                max_size=2,
            ),
        ),
        "bytes": at_bytes,
    }[kind]
    # of ten, six know the format
    return st.integers(0, 19).flatmap(lambda n: special if n < 12 else at_bytes if n < 18 else st.sampled_from(ODD))
