import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import muon, muon_momentum
from handgrad.ops.muon.op import EVERY, PLAIN
from handgrad.ops.muon.reference import Polynomial
from handgrad.testing import case_arrays, case_program, check_case, check_op, set_scalars


def run(op, sizes, dtype, backend, arrays=None, **scalars):
    """The inputs and the outputs of a call."""
    p, c = case_program(op, sizes, dtype)
    arrays = case_arrays(op, c) | (arrays or {})
    arena = backend.alloc(backend.plan(p))
    for t in (*c.ins, *c.outs):
        if t is not None and t.name in arrays:
            arena.write(t, arrays[t.name])
    set_scalars(p, arena)
    arena.write_scalars(p, **scalars)
    backend.bind(p, arena).run()
    return arrays, {name: np.array(arena.read(t), np.float64) for name, t in c.named_outs()}


@pytest.mark.parametrize("op", [muon, muon_momentum], ids=str)
def test_muon(op):
    check_op(op, [open_backend("cpu")])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "N"), [(65, 132), (132, 65)])
def test_symmetric_gemms_are_computed_by_half(rows, N, dtype):
    """Sides of several panels of the CPU's GEMM, and of one row more: the last tile is an element of the diagonal."""
    sizes = case(R=rows, N=N, rows=rows, k=rows * N, count=rows * N, without="v", **PLAIN)
    for e in check_case(muon, sizes, open_backend("cpu", 2), dtype):
        assert e.ratio <= 1, e


@pytest.mark.parametrize(
    ("polynomial", "low", "high"), [("POLAR_EXPRESS", 0.858, 1.142), ("NEWTON_SCHULZ", 0.681, 1.135)]
)
@pytest.mark.parametrize(("rows", "N"), [(24, 40), (40, 24)])
def test_singular_values_become_about_one(polynomial, low, high, rows, N):
    """Singular values from 0.005 of the norm on. The polynomials, on a fine grid of such numbers, end between 0.8589
    and 1.1411, and between 0.6818 and 1.1344."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((n, 24)))[0] for n in (rows, N))
    s = np.geomspace(1, 2e-2, 24)
    u = left * s @ right.T
    which = PLAIN | dict(polynomial=Polynomial[polynomial], scale=1e3, weight_decay=0.0)
    sizes = case(R=rows, N=N, rows=rows, k=rows * N, count=rows * N, without="v low", **which)
    _, outs = run(muon, sizes, F32, open_backend("cpu"), dict(u=u, p=np.zeros(rows * N)))  # lr 1e-3
    found = -outs["p"].reshape(rows, N)
    assert low < np.linalg.svd(found, compute_uv=False)[:24].min()
    assert np.linalg.svd(found, compute_uv=False).max() < high
    assert np.abs(left.T @ found @ right - np.diag(np.diag(left.T @ found @ right))).max() < 1e-4  # the same directions


@pytest.mark.parametrize("backend", [open_backend("cpu"), RefBackend(exact=False)], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_grad_scale_of_zero_changes_no_bit(backend, dtype):
    sizes = case(R=16, N=12, rows=8, k=192, count=192, s=24, **EVERY)
    arrays, outs = run(muon, sizes, dtype, backend, grad_scale=0.0)
    assert all(np.array_equal(outs[name], arrays[name]) for name in outs)
    arrays, outs = run(muon_momentum, case(n=64), dtype, backend, grad_scale=0.0)
    assert np.array_equal(outs["m"], arrays["m"]) and not outs["u"].any()


def test_a_share_is_the_same_bits_as_the_whole():
    """Elements 128 to 383 of a stack alone, in bf16 with stochastic rounding: what a rank does with its share."""
    whole = case(R=24, N=24, rows=8, k=576, count=576, without="low v", **PLAIN)
    arrays, outs = run(muon, whole, BF16, open_backend("cpu"))
    part = case(R=24, N=24, rows=8, k=256, count=256, without="low v", **PLAIN | dict(first=128, start=256))
    _, share = run(muon, part, BF16, open_backend("cpu"), dict(u=arrays["u"], p=arrays["p"][128:384]))
    assert np.array_equal(share["p"], outs["p"][128:384])
