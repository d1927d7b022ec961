"""Flat vectors: buckets, offsets and memory of the vectors that optimizers declare."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32, I16
from handgrad.core.errors import HandgradError
from handgrad.core.params import FLAT_ALIGN, ONES, Groups
from handgrad.core.plan import plan
from handgrad.core.program import Program


def two_groups():
    """A program of two blocks with a matrix and a vector each; matrices are one group, vectors another."""
    p = Program(F32)
    for block in ("a", "b"):
        with p.block(block):
            p.param("matrix", (10, 20), ONES)
            p.param("vector", (30,), ONES)
    p.group_by(Groups(("wide", "flat"), lambda param: "wide" if len(param.tensor.shape) > 1 else "flat"))
    return p


def test_buckets_follow_blocks_and_groups():
    found = [(b.name, b.start, b.size, [m.tensor.name for m in b.members]) for b in two_groups().buckets]
    assert found == [
        ("a.wide", 0, 256, ["a.matrix"]),
        ("a.flat", 256, 128, ["a.vector"]),
        ("b.wide", 384, 256, ["b.matrix"]),
        ("b.flat", 640, 128, ["b.vector"]),
    ]


def test_vector_has_memory_for_its_own_buckets_only():
    p = two_groups()
    wide = [b for b in p.buckets if b.group == "wide"]
    momentum = p.flat("momentum", F32, wide)
    codes = p.flat("codes", I16)
    assert (momentum.size, codes.size, p.flat_size) == (512, 768, 768)
    layout = plan(p)
    assert layout.region["state"][1] == 4 * 512 + 2 * 768
    matrix, vector = p.params["b.matrix"].tensor, p.params["b.vector"].tensor
    assert momentum.covers(matrix) and not momentum.covers(vector)
    assert layout.part("momentum", matrix)[0] - layout.start["momentum"] == 4 * 256
    assert layout.part("codes", vector)[0] - layout.start["codes"] == 2 * 640
    assert layout.part("param", vector) == (4 * 640, F32)
    assert all(layout.part(v, matrix)[0] % (2 * FLAT_ALIGN) == 0 for v in ("param", "momentum", "codes"))


@pytest.mark.parametrize(
    "backend", [open_backend("cpu"), RefBackend(), RefBackend(exact=False)], ids=["cpu", "exact", "ref"]
)
def test_slices_and_parameters_share_memory(backend):
    p = two_groups()
    p.flat("momentum", F32, [b for b in p.buckets if b.group == "wide"])
    handle = p.slice("momentum", p.buckets[2])
    arena = backend.alloc(backend.plan(p))
    arena.write(handle, np.arange(256.0))
    matrix = p.params["b.matrix"].tensor
    assert (arena.read_part("momentum", matrix) == np.arange(200.0).reshape(10, 20)).all()
    assert (arena.read_part("momentum", p.params["a.matrix"].tensor) == 0).all()


def test_undeclared_group_is_rejected():
    p = Program(F32)
    p.param("w", (2,), ONES)
    p.group_by(Groups(("one",), lambda param: "other"))
    with pytest.raises(HandgradError, match="'other' for w"):
        assert p.buckets


def test_groups_after_the_flat_order_is_read_are_rejected():
    p = two_groups()
    assert p.buckets
    with pytest.raises(HandgradError, match="before the flat order is read"):
        p.group_by(Groups(("one",), lambda param: "one"))


def test_duplicate_vector_is_rejected():
    p = two_groups()
    p.flat("m", F32)
    for name in ("m", "param", "state"):
        with pytest.raises(HandgradError, match="names of flat vectors are unique"):
            p.flat(name, F32)


def test_programs_with_different_shapes_of_a_state_are_rejected():
    """Otherwise the larger cache would get the region of the smaller one."""
    small, large = Program(F32), Program(F32)
    small.state("cache", (4, 8), F32)
    large.state("cache", (16, 8), F32)
    for programs in ((small, large), (large, small)):
        with pytest.raises(HandgradError, match="share state 'cache'"):
            plan(*programs)
    same = Program(F32)
    same.state("cache", (4, 8), F32)
    assert plan(small, same).region["state"][1] == 4 * 8 * 4 * 2  # aligned to 256 bytes, once
