"""Segments and micro-batches; accumulation: the first writer of a gradient overwrites it, all others add."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import ONLY, MicroBatch, Op, Phase, When
from handgrad.core.params import ONES
from handgrad.core.program import Program, Segment
from handgrad.core.tensor import Role, Tensor
from handgrad.ops import fill, linear_backward_w

BACKENDS = [open_backend("cpu"), RefBackend(exact=False), RefBackend()]
FIRST, MIDDLE, LAST = MicroBatch(True, False), MicroBatch(False, False), MicroBatch(False, True)


def gradient_program(calls):
    """A program of `fill` calls (value, when) on the gradient of one parameter; returns it and the gradient."""
    p = Program(F32)
    grad = p.grad(p.param("w", (5,), ONES))
    for value, when in calls:
        p.when = when
        p.emit(fill, into={"x": grad}, n=5, value=value)
    return p, grad


def run_step(backend, p, grad, micro_batches):
    """The gradient after the program ran for these micro-batches; it was 100 before."""
    arena = backend.alloc(backend.plan(p))
    arena.write(grad, 100.0)
    bound = backend.bind(p, arena)
    for micro_batch in micro_batches:
        bound.run(micro_batch=micro_batch)
    return np.array(arena.read(grad), np.float64)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__ + str(getattr(b, "exact", "")))
def test_first_writer_writes_and_all_others_add(backend):
    p, grad = gradient_program([(1.0, When.ALWAYS), (10.0, When.ALWAYS)])
    assert (run_step(backend, p, grad, [ONLY]) == 11).all()
    assert (run_step(backend, p, grad, [FIRST, MIDDLE, LAST]) == 33).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__ + str(getattr(b, "exact", "")))
def test_calls_run_for_their_micro_batches_only(backend):
    p, grad = gradient_program([(1.0, When.ALWAYS), (10.0, When.FIRST), (100.0, When.LAST)])
    assert (run_step(backend, p, grad, [ONLY]) == 111).all()
    assert (run_step(backend, p, grad, [FIRST, MIDDLE, LAST]) == 113).all()
    seen = []
    arena = backend.alloc(backend.plan(p))
    backend.bind(p, arena).run_each(lambda c, seconds: seen.append(c.attrs["value"]), None, MIDDLE)
    assert seen == [1.0]


def test_segments_are_consecutive_and_cover_the_list():
    p, _ = gradient_program([(1.0, When.ALWAYS)])
    assert p.segments.forward_backward == Segment(0, 1) and p.segments.norm_update == Segment(1, 1)
    for phase in (Phase.NORM, Phase.UPDATE, Phase.UPDATE):
        p.phase = phase
        p.emit(fill, into={"x": p.grads["w"]}, n=5, value=0.0)
    s = p.segments
    assert (s.forward_backward, s.norm, s.update, s.norm_update) == (
        Segment(0, 1),
        Segment(1, 2),
        Segment(2, 4),
        Segment(1, 4),
    )
    assert p.part(s.update) == p.calls[2:] and p.part(None) == p.calls


@pytest.mark.parametrize("name", ["first", "block", "op", "phase", "when", "flops", "scratch"])
def test_reserved_argument_names_are_rejected(name):
    with pytest.raises(HandgradError, match=name):
        type("Wrong", (Op,), {"name": "wrong", "ins": f"{name}:N", "outs": "y:N"})


def test_duplicate_argument_names_are_rejected():
    with pytest.raises(HandgradError, match="'x'"):
        type("Wrong", (Op,), {"name": "wrong", "ins": "x:N", "outs": "x:N"})


def test_kernels_compiled_from_another_declaration_are_rejected():
    library = open_backend("cpu")._lib
    library.check_arguments("fill", fill.cpu.args)
    with pytest.raises(HandgradError, match="compiled for the arguments"):
        library.check_arguments("add", "y a | N C")


def test_second_call_adds_to_the_gradient_within_a_micro_batch():
    p = Program(F32)
    w = p.param("w", (2, 3), ONES)
    x, dy = (Tensor(name, (4, n), F32, Role.INPUT) for name, n in (("x", 3), ("dy", 2)))
    p.inputs |= {"x": x, "dy": dy}
    for _ in range(2):
        p.emit(linear_backward_w, dy, x, into={"dw": p.grad(w), "db": None})
    assert [c.first for c in p.calls] == [frozenset({"dw"}), frozenset()]
    assert [c.accumulates("dw", ONLY) for c in p.calls] == [False, True]
    assert [c.accumulates("dw", LAST) for c in p.calls] == [True, True]


def test_a_first_writer_of_the_last_micro_batch_is_refused():
    """It would add to the gradient of the step before."""
    with pytest.raises(HandgradError, match="runs in the first micro-batch"):
        gradient_program([(1.0, When.LAST)])


def test_gradient_calls_run_for_the_micro_batches_of_their_forward_call():
    p, _ = gradient_program([(1.0, When.FIRST)])
    p.when = When.ALWAYS
    with p.at(p.calls[0], Phase.BACKWARD):
        p.emit(fill, into={"x": p.grads["w"]}, n=5, value=1.0)
    assert [c.when for c in p.calls] == [When.FIRST, When.FIRST] and p.when is When.ALWAYS
