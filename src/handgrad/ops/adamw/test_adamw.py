import ml_dtypes
import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import adamw
from handgrad.ops.adamw.reference import join_weight, round_weight, split_weight
from handgrad.testing import case_arrays, case_program, check_op, set_scalars

BACKENDS = [open_backend("cpu"), RefBackend(exact=False)]


def update(backend, dtype, arrays, grad_scale=1.0, **attrs):
    """p, m, v and, if `arrays` has it, low, after one step at learning rate 1e-3."""
    n = arrays["p"].size
    sizes = dict(n=n, start=128, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, low="low" in arrays)
    p, c = case_program(adamw, case(**sizes | attrs), dtype)
    arena = backend.alloc(backend.plan(p))
    for t in (*c.ins, *c.outs):
        if t is not None:
            arena.write(t, arrays[t.name])
    set_scalars(p, arena)
    arena.write_scalars(p, grad_scale=grad_scale)
    backend.bind(p, arena).run()
    return {name: np.array(arena.read(t)) for name, t in c.named_outs()}


def weights(n=100_000):
    """Finite float32 numbers: random bits, ties between bf16 numbers, zeros, the largest and the smallest."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, n, np.uint64).astype(np.uint32)
    ends = np.array([0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 1], np.uint32)
    x = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000, ends]).view(np.float32)
    return x[np.isfinite(x)]


def nearest(x):
    """x as bf16, ties to even, in float32."""
    with np.errstate(over="ignore"):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_adamw():
    check_op(adamw, [open_backend("cpu")])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_split_weight_is_bit_exact(backend):
    """Joining a split weight, and an update that changes nothing, keep every bit."""
    x = weights()
    y, low = split_weight(x)
    assert np.array_equal(join_weight(y, low).view(np.uint32), x.view(np.uint32))
    even = nearest(x)
    assert np.mean(y == even) > 0.75 and np.all(np.abs(y - x) <= np.abs(even - x))  # only ties may differ
    zeros = np.zeros_like(x)
    got = update(backend, BF16, dict(p=y, low=low, m=zeros, v=zeros, grad=zeros), weight_decay=0.0)
    assert np.array_equal(got["p"].astype(np.float32), y) and np.array_equal(got["low"], low)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(("dtype", "low"), [(F32, False), (BF16, True), (BF16, False)])
def test_grad_scale_of_zero_changes_no_bit(backend, dtype, low):
    arrays = case_arrays(adamw, case_program(adamw, adamw.cases[2], dtype)[1])
    if not low:
        arrays.pop("low", None)
    arrays["grad"] = np.full_like(arrays["grad"], np.nan)
    got = update(backend, dtype, arrays, grad_scale=0.0)
    assert all(np.array_equal(got[name], arrays[name].astype(got[name].dtype)) for name in got)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_stochastic_rounding_keeps_small_updates_on_average(backend):
    """Steps of 1/10 of the bf16 spacing below a weight of 1: rounding to nearest would never change the weight."""
    n = 100_000
    ones, zeros = np.ones(n), np.zeros(n)
    wanted = 1 - 2.0**-8 / 10
    got = update(backend, BF16, dict(p=ones, m=zeros, v=zeros, grad=zeros), weight_decay=(1 - wanted) / 1e-3)["p"]
    assert set(got.astype(np.float64)) == {1.0, 1 - 2.0**-8}
    spread = 2.0**-8 * np.sqrt(0.1 * 0.9 / n)
    assert abs(got.astype(np.float64).mean() - wanted) < 5 * spread


def test_stochastic_rounding_matches_oracle():
    arrays = case_arrays(adamw, case_program(adamw, case(**adamw.cases[3].sizes), BF16)[1])
    ours, oracle = (update(b, BF16, arrays)["p"].view(np.uint16) for b in BACKENDS)
    assert np.mean(ours == oracle) > 0.999  # a weight that differs in the last bit may round the other way


def test_stochastic_rounding_keeps_bf16_and_non_finite_values():
    x = np.concatenate([split_weight(weights(1000))[0], np.array([np.inf, -np.inf, np.nan], np.float32)])
    x = np.concatenate([x, x, x])
    assert np.array_equal(round_weight(x, nearest(x), 4, seed=1, step=2), x, equal_nan=True)
    y = np.linspace(1, 2, 1000, dtype=np.float32)
    keys = (0, 1, 1), (4, 1, 1), (0, 2, 1), (0, 1, 2)
    draws = [round_weight(y, nearest(y), *key) for key in keys]
    assert all(np.any(a != b) for i, a in enumerate(draws) for b in draws[:i])
    assert np.array_equal(
        round_weight(y[4:], nearest(y[4:]), 4, 1, 1), draws[0][4:]
    )  # depends on the index in the flat vector
