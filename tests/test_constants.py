"""Constants: written once, for every program of an arena, by every backend."""

import shutil

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.base import Arena
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.core.plan import aligned, plan
from handgrad.core.program import Program
from handgrad.ops import add
from tests.emulator import EmulatedBackend

NEEDS_GXX = pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++")
BACKENDS = [
    pytest.param(open_backend("cpu"), id="cpu"),
    pytest.param(RefBackend(), id="exact"),
    pytest.param(RefBackend(exact=False), id="rounded"),
    pytest.param(EmulatedBackend(), id="emulated", marks=NEEDS_GXX),
]


def adding(rows, value):
    """A program: y = x + c, and c declared twice."""
    p = Program(F32)
    x = p.input("x", (rows, 3), F32)
    c = [p.constant("c", (rows, 3), F32, lambda v=v: np.full((rows, 3), v)) for v in (value, -1)]
    assert c[0] is c[1]
    p.output("y", p.emit(add, x, c[0]))
    return p


def outputs(backend):
    """y - x of two programs that share an arena, each run twice."""
    programs, found = (adding(4, 2.5), adding(7, 4.5)), []
    arena = backend.alloc(backend.plan(*programs))
    for p in programs:
        arena.write(p.inputs["x"], 1)
        run = backend.bind(p, arena)
        for _ in range(2):
            run.run()
            found.append((arena.read(p.outputs["y"]) - 1).tolist())
        assert list(p.inputs) == ["x"]
    return found


WANTED = [[[value] * 3] * rows for rows, value in ((4, 2.5), (7, 4.5)) for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_of_all_programs_are_written_once(backend, monkeypatch):
    assert outputs(backend) == WANTED
    monkeypatch.setattr(Arena, "write_constants", lambda self: None)
    assert outputs(backend) != WANTED


def test_constants_are_io_to_the_byte():
    programs = adding(40, 1), adding(70, 1)
    nbytes = sum(aligned(p.scalars.nbytes) + 2 * aligned(4 * 3 * rows) for p, rows in zip(programs, (40, 70)))
    assert plan(*programs).region["io"][1] == nbytes
