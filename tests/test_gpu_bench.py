"""bench/gpu_ops.py without a GPU: every row of it is recorded, filled and run."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16
from handgrad.core.tensor import Role

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_ops.py"


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(SCRIPT))


def test_the_smoke_run_prints_every_row(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke"])
    bench["main"]()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [name for name, _, _ in bench["rows"](True)]
    assert all("GB/s" in line for line in lines)


def test_calls_rotate_over_buffers_larger_than_l2(bench):
    """At the real sizes, recorded only: no input comes again before CACHE_BYTES have moved, and no output twice."""
    for name, what, sizes in bench["rows"](False):
        p = bench["record"](name, sizes, BF16, bench["CACHE_BYTES"])
        assert len(p.calls) >= bench["CALLS"] and all(c.op.name == name for c in p.calls), (name, what)
        head = p.calls[0]
        again = next((i for i, c in enumerate(p.calls) if i and head.ins and c.ins[0] is head.ins[0]), len(p.calls))
        assert again >= 2 and again * bench["moved"](head) >= bench["CACHE_BYTES"], (name, what, again)
        made = [t for c in p.calls for t in c.outs if t is not None and t.role in (Role.ACT, Role.GRAD)]
        assert len(made) == len(set(made)), (name, what)


def test_second_moments_are_positive(bench):
    name, _, sizes = next(row for row in bench["rows"](True) if row[0] == "adamw")
    p = bench["record"](name, sizes, BF16, 0)
    arena = RefBackend(exact=False).alloc(RefBackend(exact=False).plan(p))
    bench["fill"](p, arena)
    assert (arena.view(p.calls[0].v) > 0).all() and np.ptp(arena.view(p.calls[0].low)) > 100
