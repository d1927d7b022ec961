import ml_dtypes
import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import adamw, adamw_bf16, adamw_int8
from handgrad.ops.adamw.reference import (
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    join_weight,
    round_weight,
    split_weight,
)
from handgrad.testing import case_arrays, case_program, check_case, check_op, set_scalars

BACKENDS = [open_backend("cpu"), RefBackend(exact=False)]


def update(backend, dtype, arrays, grad_scale=1.0, op=adamw, **attrs):
    """p, m, v and, if `arrays` has it, low, after one step at learning rate 1e-3."""
    n = arrays["p"].size
    sizes = dict(n=n, b=n // 128, start=128, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, low="low" in arrays)
    p, c = case_program(op, case(**sizes | attrs, without="factor"), dtype)
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
    arrays = case_arrays(adamw, case_program(adamw, adamw.cases[3], BF16)[1])
    ours, oracle = (update(b, BF16, arrays)["p"].view(np.uint16) for b in BACKENDS)
    assert np.mean(ours == oracle) > 0.999  # a weight that differs in the last bit may round the other way


@pytest.mark.parametrize("op", [adamw_bf16, adamw_int8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_small_moments_match_the_oracle(op, dtype):
    """Weights and scales within the derived tolerance, codes bit for bit but where a last bit decides a rounding."""
    for c in (c for c in op.cases if not c.real):
        assert all(e.ratio <= 1 for e in check_case(op, c, BACKENDS[0], dtype))
    arrays = case_arrays(op, case_program(op, op.cases[2], dtype)[1])
    ours, oracle = (update(b, dtype, arrays, op=op, beta2=0.999) for b in BACKENDS)
    for name in ("m", "v"):
        assert np.mean(ours[name] == oracle[name]) > 0.99


def test_codes_have_the_mean_of_what_they_encode():
    """2,500 roundings of each of 128 values of 12 orders of magnitude: the mean of what is decoded is within 5
    standard errors. Rounding to the nearest code, a mutation, fails."""
    rng = np.random.default_rng(0)
    x = (10.0 ** np.linspace(-12, 0, 128)).astype(np.float32)
    sums = {name: np.zeros(128) for name in ("first", "second", "nearest")}
    squares, count = {name: np.zeros(128) for name in sums}, 2500
    for bits in rng.integers(0, 1 << 16, (count, 128)).astype(np.uint32):
        found = {
            "first": -decode_first(*encode_first(-x, bits)),
            "second": decode_second(*encode_second(x, bits)),
            "nearest": decode_first(*encode_first(x, np.full(128, 1 << 15, np.uint32))),
        }
        for name, y in found.items():
            sums[name] += y
            squares[name] += y.astype(np.float64) ** 2
    far = {}
    for name, total in sums.items():
        error = np.sqrt(np.maximum(squares[name] / count - (total / count) ** 2, 0) / count) + 1e-6 * x
        far[name] = np.abs(total / count - x) > 5 * error
    # roundings up of what is below 2e-5 are too rare for a normal law; v below its least code is rounded up
    assert not far["first"][x > 2e-5].any() and not far["second"][x > 1e-8].any() and far["nearest"].any()
    v = decode_second(*encode_second(np.where(x < 1e-9, 0, x), np.full(128, 0xFFFF, np.uint32)))
    assert np.array_equal(v > 0, x >= 1e-9)  # zero stays, what is above stays above: its root divides m


@pytest.mark.parametrize("op", [adamw_bf16, adamw_int8], ids=str)
def test_second_moments_decay_without_gradients(op):
    """By 0.999 a step, less than half a last bit: rounding to nearest would keep v at its start. In each block one
    element keeps a gradient, so that the scale stays and the codes have to move."""
    n, steps = 1024, 200
    grad = np.zeros(n)
    grad[::128] = np.sqrt(2.0)
    arrays = dict(p=np.zeros(n), grad=grad)
    if op is adamw_bf16:
        arrays |= dict(m=np.zeros(n), v=np.ones(n) + (grad > 0))
    else:  # 214^4 / 255^4 of the scale 2 is 0.992
        arrays |= dict(m=np.zeros(n), v=np.where(grad > 0, 255, 214), m_scale=np.zeros(n // 128))
        arrays |= dict(v_scale=np.full(n // 128, 2.0))
    sizes = dict(n=n, b=n // 128, start=128, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    backend = BACKENDS[0]
    p, c = case_program(op, case(**sizes), F32)
    arena = backend.alloc(backend.plan(p))
    for t in (*c.ins, *c.outs):
        if t is not None:
            arena.write(t, arrays[t.name])
    set_scalars(p, arena)
    run = backend.bind(p, arena)
    for k in range(1, steps + 1):
        arena.write_scalars(p, grad_scale=1.0, step=k)
        run.run()
    held = {name: np.array(arena.read(t), np.float32) for name, t in c.named_outs()}
    v = held["v"] if op is adamw_bf16 else decode_second(held["v"], held["v_scale"])
    start = 1.0 if op is adamw_bf16 else 2 * (214 / 255) ** 4
    spread = v[grad == 0].std() / np.sqrt(n)
    assert abs(v[grad == 0].mean() - start * 0.999**steps) < 5 * spread
    assert v[grad > 0] == pytest.approx(2.0, rel=0.05)


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
