import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import schedule_free, schedule_free_average, schedule_free_count
from handgrad.ops.adamw.reference import join_weight, split_weight
from handgrad.testing import case_arrays, case_program, check_case, run_case, set_scalars

CPU = open_backend("cpu", 2)
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", [schedule_free, schedule_free_count, schedule_free_average], ids=str)
def test_op(op, dtype):
    for e in (e for c in op.cases if not c.real for e in check_case(op, c, CPU, dtype)):
        assert e.ratio <= 1, e


def counts(rates, start=(0.0, 0.0), grad_scale=1.0, backend=CPU):
    """count after each of these learning rates."""
    p, c = case_program(schedule_free_count, case(), F32)
    arena, found = backend.alloc(backend.plan(p)), []
    run = backend.bind(p, arena)
    arena.write(c.count, start)
    set_scalars(p, arena)
    for lr in rates:
        arena.write_scalars(p, lr=lr, grad_scale=grad_scale)
        run.run()
        found.append(np.array(arena.read(c.count), np.float64))
    return np.array(found)


def test_count_is_the_sum_of_weights_over_the_last_one():
    """Warm-up, a constant rate, a decay, a new peak: a step's weight is the square of the largest rate so far. Each
    count is off by 2^-24 of itself once while it grows, and those errors shrink with the rest; 60 steps."""
    rates = np.float32([0.1 * t for t in range(1, 11)] + [1.0] * 30 + [1 - 0.09 * t for t in range(10)] + [2.0] * 10)
    weights = np.maximum.accumulate(rates.astype(np.float64)) ** 2
    found = counts(rates)
    np.testing.assert_allclose(found[:, 0], np.cumsum(weights) / weights, rtol=60 * 2**-24)
    assert np.array_equal(found[:, 1], np.sqrt(weights))
    assert np.array_equal(counts([1e-3] * 3, (2.0**24 - 4, np.float32(1e-3)))[:, 0], 2.0**24 - np.array([3, 2, 1]))


def test_a_step_without_a_rate_or_an_update_is_not_counted():
    assert not counts([0.0, 0.0]).any() and counts([0.0, 1e-3])[-1, 0] == 1
    for backend in (CPU, RefBackend()):
        assert np.array_equal(counts([1.0], (7.0, 0.5), 0.0, backend), [(7.0, 0.5)])


def run(arrays, dtype=F32, **changes):
    sizes = dict(n=arrays["p"].size, start=0, weight_decay=0.1, **HYPER) | changes
    p, c = case_program(schedule_free, case(**sizes), dtype)
    return run_case(p, c, arrays, CPU)  # lr 1e-3, the second step of its state, grad_scale 1/2


def test_first_step_forgets_the_start_and_y_interpolates():
    """With count 1 the average is z: y = z. Later y stays between x and z, as formed by hand from the definition."""
    start = dict(p=np.array([1.0, -2.0]), z=np.array([1.0, -2.0]), v=np.zeros(2), grad=np.array([3.0, -1.0]))
    got = run(start | {"count": np.array([1.0, 1e-3])})
    np.testing.assert_array_equal(got["p"], got["z"])
    assert np.all(np.abs(got["z"] - start["z"]) > 1e-3)  # 1 / sqrt(1 - beta2^2) (1 - beta2) is 0.7 of a step
    x, z = np.array([0.5, 1.0]), np.array([1.5, 0.25])
    y = 0.9 * x + 0.1 * z
    got = run(dict(p=y, z=z, v=np.zeros(2), grad=np.array([3.0, -1.0]), count=np.array([4.0, 1e-3])), weight_decay=0.5)
    mean = 0.75 * x + 0.25 * got["z"]
    np.testing.assert_allclose(got["p"], 0.9 * mean + 0.1 * got["z"], rtol=0, atol=2**-22)


def test_decay_is_of_y_and_reaches_z():
    """A mutation, decay of z by itself, would leave z at 0."""
    got = run(dict(p=np.ones(4), z=np.zeros(4), v=np.zeros(4), grad=np.zeros(4), count=np.array([2.0, 1e-3])))
    np.testing.assert_allclose(got["z"], -1e-4, rtol=2**-22)
    np.testing.assert_allclose(got["p"], 0.5 - 1e-4 * (1 - 0.9 / 2), atol=2**-24)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_without_update_changes_no_bit(dtype):
    p, c = case_program(schedule_free, schedule_free.cases[0], dtype)
    arrays = case_arrays(schedule_free, c) | {"grad": np.full(33, np.nan)}
    arena = CPU.alloc(CPU.plan(p))
    for t in (*c.ins, *c.outs):
        if t is not None:
            arena.write(t, arrays[t.name])
    set_scalars(p, arena)
    arena.write_scalars(p, grad_scale=0.0)
    before = {name: np.array(arena.read(t)) for name, t in c.named_outs()}
    CPU.bind(p, arena).run()
    assert all(np.array_equal(arena.read(t), before[name]) for name, t in c.named_outs())


def test_average_inverts_the_interpolation():
    """From y, in bf16 in two halves, to x, rounded once: y is off by 2^-24, which 1 / beta1 enlarges."""
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 640)).astype(np.float32)
    y = np.float32(0.9) * x + np.float32(0.1) * z
    for dtype, unit in ((F32, 2.0**-22), (BF16, 2.0**-8)):
        absent = "" if dtype is BF16 else "low"
        p, c = case_program(schedule_free_average, case(n=640, beta1=0.9, without=absent), dtype)
        high, low = split_weight(y)
        arrays = dict(p=high, low=low, z=z) if dtype is BF16 else dict(p=y, z=z)
        got = run_case(p, c, arrays, CPU)["p"]
        np.testing.assert_allclose(got, x, rtol=unit, atol=2**-21)
        assert dtype is F32 or np.array_equal(join_weight(high, low), y)
    p, c = case_program(schedule_free_average, case(n=640, beta1=0.9, without="low"), F32)
    assert np.array_equal(run_case(p, c, dict(p=y, z=y), CPU)["p"].astype(np.float32), y)  # to the bit
