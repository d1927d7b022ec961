"""lora: against the oracle and finite differences, against PyTorch, and what its spans refuse."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.program import Program
from handgrad.ops import OPS, lora, lora_backward
from handgrad.testing import case_arrays, case_program, check_op, gradcheck_op, run_case


@pytest.mark.parametrize("name", ["lora", "lora_backward"])
def test_lora(name):
    check_op(OPS[name], [open_backend("cpu")])


def test_lora_is_pytorchs():
    """q and v of packed q, k, v have adapters, k has none: in float64 the oracle, in float32 the kernels."""
    torch = pytest.importorskip("torch")
    case = next(c for c in lora.cases if c.sizes["n1"] and not c.sizes["n2"] and c.sizes["M"] == 77)
    p, c = case_program(lora, case, F32)
    arrays = case_arrays(lora, c)
    base, u, w = (torch.tensor(arrays[name], requires_grad=True) for name in ("base", "u", "w"))
    R, scale = case.sizes["R"], case.sizes["scale"]
    y = base + torch.cat([scale * u[:, :R] @ w[:40].T, torch.zeros(19, 20), scale * u[:, R:] @ w[40:].T], dim=1)
    dy = torch.tensor(np.random.default_rng(1).standard_normal(y.shape))
    y.backward(dy)
    for backend, limit in ((open_backend("ref"), 1e-13), (open_backend("cpu"), 3e-6)):
        got = run_case(p, c, arrays, backend)["y"]
        np.testing.assert_allclose(got, y.detach().numpy(), rtol=0, atol=limit * 10)
        q, back = case_program(lora_backward, case, F32)
        got = run_case(q, back, {"dy": dy.numpy(), "u": arrays["u"], "w": arrays["w"]}, backend)
        np.testing.assert_allclose(got["du"], u.grad.numpy(), rtol=0, atol=limit * 10)
        np.testing.assert_allclose(got["dw"], w.grad.numpy(), rtol=0, atol=limit * 20)
    np.testing.assert_array_equal(base.grad.numpy(), dy.numpy())


def test_a_gradient_without_its_scale_is_caught(monkeypatch):
    """Negative control of the finite differences."""
    kind = type(lora_backward)
    right = kind.ref
    monkeypatch.setattr(kind, "ref", lambda self, v: (right(self, v)[0], right(self, v)[1] / v.scale))
    assert gradcheck_op(lora, lora.cases[0]) > 1e-2


def test_rows_and_threads_do_not_change_bits():
    """Decoding computes rows one at a time, and any number of threads divides the work."""
    case = lora.cases[3]
    p, c = case_program(lora, case, F32)
    arrays = case_arrays(lora, c)
    whole = run_case(p, c, arrays, open_backend("cpu", 2))["y"]
    one = type(case)(case.sizes | {"N": 1})
    for row in (0, 32):
        q, single = case_program(lora, one, F32)
        mine = arrays | {name: arrays[name][row : row + 1] for name in ("base", "u")}
        np.testing.assert_array_equal(run_case(q, single, mine, open_backend("cpu", 1))["y"][0], whole[row])


@pytest.mark.parametrize(
    ("shapes", "spans", "message"),
    [
        (((2, 8), (2, 2), (8, 2)), (1, 8, 0, 0, 0, 0), "spans are ascending columns of the 8 of y"),
        (((2, 8), (2, 4), (8, 2)), (4, 4, 0, 4, 0, 0), "spans are ascending columns of the 8 of y"),
        (((2, 8), (2, 2), (8, 2)), (0, 0, 0, 8, 0, 0), "the first of three spans are used"),
        (((2, 8), (2, 2), (7, 2)), (0, 8, 0, 0, 0, 0), "w has a row for each of 8 columns.*got 7"),
        (((2, 8), (2, 2), (8, 2)), (0, 4, 4, 4, 0, 0), "u has 2 columns for each of 2 spans.*got 2"),
    ],
)
def test_spans_that_do_not_fit_are_refused(shapes, spans, message):
    p = Program(F32)
    ins = [p.input(str(i), shape, F32) for i, shape in enumerate(shapes)]
    with pytest.raises(HandgradError, match=message):
        p.emit(lora, *ins, scale=1.0, **dict(zip(("at0", "n0", "at1", "n1", "at2", "n2"), spans)))
