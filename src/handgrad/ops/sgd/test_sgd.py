import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import case
from handgrad.ops import sgd
from handgrad.testing import case_program, check_case, run_case

CPU = open_backend("cpu", 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sgd(dtype):
    for e in (e for c in sgd.cases if not c.real for e in check_case(sgd, c, CPU, dtype)):
        assert e.ratio <= 1, e


def test_momentum_is_a_sum_and_nesterov_looks_ahead():
    """By hand, from m = 0 with grad_scale 1/2, learning rate 1e-3: plain and momentum make the same first step,
    Nesterov's is 1 + momentum times as long."""
    moved = {}
    for without, nesterov in (("m", False), ("", False), ("", True)):
        p, c = case_program(sgd, case(n=4, start=0, nesterov=nesterov, weight_decay=0.0, without=without), F32)
        arrays = {"p": np.ones(4), "grad": np.arange(4.0), "m": np.zeros(4)}
        moved[without, nesterov] = 1 - run_case(p, c, arrays, CPU)["p"]
    np.testing.assert_allclose(moved["m", False], 0.5e-3 * np.arange(4), atol=2**-24)
    np.testing.assert_allclose(moved["", False], moved["m", False], atol=2**-24)
    np.testing.assert_allclose(moved["", True], 1.9 * moved["m", False], atol=2**-23)  # momentum is 0.9


def test_decay_goes_through_the_momentum():
    """A mutation of the formula: decay beside the momentum would leave m at 0."""
    p, c = case_program(sgd, case(n=4, start=0, nesterov=False, weight_decay=0.5), F32)
    got = run_case(p, c, {"p": np.ones(4), "grad": np.zeros(4), "m": np.zeros(4)}, CPU)
    np.testing.assert_allclose(got["m"], 0.5)
    np.testing.assert_allclose(got["p"], 1 - 0.5e-3, atol=2**-24)


def test_slice_between_draws_is_rejected():
    with pytest.raises(HandgradError, match="a slice starts at a multiple of 4 elements, but got 2"):
        case_program(sgd, case(n=4, start=2, nesterov=False, weight_decay=0.0), F32)
