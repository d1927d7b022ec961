import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import case
from handgrad.core.program import Program
from handgrad.ops import OPS, gated, gated_backward
from handgrad.ops.act import Act
from handgrad.testing import case_arrays, case_program, check_op, gradcheck_op, run_case


@pytest.mark.parametrize("name", ["gated", "gated_backward"])
def test_gated(name):
    check_op(OPS[name], [open_backend("cpu")])


@pytest.mark.parametrize("act", Act)
def test_gated_is_pytorchs(act):
    """Forward and backward, in float64 for the oracle and in float32 for the kernels: a few roundings apart."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    theirs = {
        Act.NONE: lambda v: v,
        Act.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
        Act.GELU_ERF: F.gelu,
        Act.RELU: F.relu,
        Act.SILU: F.silu,
        Act.TANH: torch.tanh,
    }[act]
    rng = np.random.default_rng(0)
    x, dy = 3 * rng.standard_normal((37, 2 * 21)), rng.standard_normal((37, 21))
    x, dy = x.astype(np.float32).astype(np.float64), dy.astype(np.float32).astype(np.float64)
    leaf = torch.tensor(x, requires_grad=True)
    gate, up = leaf.chunk(2, dim=1)
    y = theirs(gate) * up
    y.backward(torch.tensor(dy))
    for backend, limit in ((open_backend("ref"), 1e-13), (open_backend("cpu"), 1e-6)):
        p, c = case_program(gated, case(N=37, G=42, act=act), F32)
        got = run_case(p, c, {"x": x}, backend)["y"]
        np.testing.assert_allclose(got, y.detach().numpy(), rtol=0, atol=limit * np.abs(x).max() ** 2)
        p, c = case_program(gated_backward, case(N=37, G=42, act=act), F32)
        got = run_case(p, c, {"dy": dy, "x": x}, backend)["dx"]
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=0, atol=limit * np.abs(x).max() * np.abs(dy).max())


def test_swapped_gate_and_up_are_caught(monkeypatch):
    """Negative control of the finite differences: the halves of the gradient in the other order."""
    kind = type(gated_backward)
    right = kind.ref
    monkeypatch.setattr(kind, "ref", lambda self, v: (np.roll(right(self, v)[0], v.M, axis=1),))
    assert gradcheck_op(gated, gated.cases[0]) > 1e-2


def test_gated_keeps_the_same_bits_in_one_row_and_in_many():
    """Decoding computes rows one at a time: a row's bits do not depend on the others."""
    backend = open_backend("cpu")
    p, many = case_program(gated, case(N=5, G=2 * 2100, act=Act.GELU_ERF), F32)
    x = case_arrays(gated, many)["x"]
    whole = run_case(p, many, {"x": x}, backend)["y"]
    p, one = case_program(gated, case(N=1, G=2 * 2100, act=Act.GELU_ERF), F32)
    for row in range(5):
        np.testing.assert_array_equal(run_case(p, one, {"x": x[row : row + 1]}, backend)["y"][0], whole[row])


def test_columns_that_do_not_pair_are_refused():
    p = Program(F32)
    with pytest.raises(HandgradError, match=r"\[gated\] x has an even number of columns.*, but got 5"):
        p.emit(gated, p.input("x", (2, 5), F32), act=Act.SILU)
    with pytest.raises(HandgradError, match=r"\[gated_backward\] dy has half of x's 6 columns, but got 2"):
        p.emit(gated_backward, p.input("dy", (2, 2), F32), p.input("x2", (2, 6), F32), act=Act.SILU)
