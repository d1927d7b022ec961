"""Which calls overlap later ones, and which call waits for each: the first one that uses the same memory."""

import pytest

from handgrad.core import streams
from handgrad.core.dtypes import F32
from handgrad.core.params import ONES
from handgrad.core.precision import Precision
from handgrad.core.program import Program
from handgrad.core.streams import joins
from handgrad.core.tensor import Role, Tensor
from handgrad.models import gpt2
from handgrad.ops import add, fill, global_norm, linear_backward_w
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.record import record_train


def program():
    """A program that computes a weight gradient, and the inputs of that call."""
    p = Program(F32)
    w = p.param("w", (2, 2), ONES)
    x, dy = (Tensor(name, (2, 2), F32, Role.ACT) for name in ("x", "dy"))
    p.emit(linear_backward_w, dy, x, into={"dw": p.grad(w), "db": None})
    return p, x, dy


def test_weight_gradient_overlaps_one_call():
    p, _, dy = program()
    for _ in range(3):
        p.emit(add, dy, dy)
    assert joins(p) == [2, 2, 3, 4]


def test_reader_of_a_gradient_waits_for_its_writer():
    """A reduction or norm right after the last writer must wait for it, whichever handle it reads."""
    p, _, _ = program()
    p.emit(global_norm, p.whole("grad"), into={"scalars": p.scalars}, clip=0.0)
    assert joins(p)[0] == 1


def test_second_writer_of_a_gradient_waits_for_the_first():
    p, _, _ = program()
    p.emit(fill, into={"x": p.grads["w"]}, n=4, value=1.0)
    assert joins(p)[0] == 1


def test_writer_of_an_input_waits_for_its_reader():
    p = Program(F32)
    w = p.param("w", (2, 2), ONES)
    x, dy = p.grad(p.param("a", (2, 2), ONES)), Tensor("dy", (2, 2), F32, Role.ACT)
    p.emit(linear_backward_w, dy, x, into={"dw": p.grad(w), "db": None})
    p.emit(fill, into={"x": x}, n=4, value=1.0)
    assert joins(p)[0] == 1


def test_disjoint_slices_of_a_vector_do_not_conflict():
    p = Program(F32)
    a, b = (p.param(name, (2, 2), ONES) for name in "ab")
    x, dy = (Tensor(name, (2, 2), F32, Role.ACT) for name in ("x", "dy"))
    p.emit(linear_backward_w, dy, x, into={"dw": p.grad(a), "db": None})
    p.emit(fill, into={"x": p.grad(b)}, n=4, value=1.0)
    assert joins(p)[0] == 2


def test_every_weight_gradient_of_gpt2_overlaps_the_call_after_it():
    p = record_train(gpt2("124m"), AdamW(), 64, Precision(), Execution(micro_batch=1), chunks=1)
    waits = [j - i for i, (c, j) in enumerate(zip(p.calls, joins(p))) if c.op is linear_backward_w]
    assert waits == [2] * 48


def test_mutation_without_conflicts_is_caught(monkeypatch):
    monkeypatch.setattr(streams, "_intersect", lambda some, others: False)
    with pytest.raises(AssertionError):
        test_reader_of_a_gradient_waits_for_its_writer()
