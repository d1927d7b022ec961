import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.ops import global_norm
from handgrad.testing import case_arrays, case_program, check_op, run_case


def norm_and_scale(change):
    """grad_norm and grad_scale of the largest small case after `change` was made to its gradient."""
    p, c = case_program(global_norm, global_norm.cases[2], F32)
    grad = case_arrays(global_norm, c)["grad"]
    change(grad)
    return run_case(p, c, {"grad": grad}, open_backend("cpu"))["knobs"]


def test_global_norm():
    check_op(global_norm, [open_backend("cpu")])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_reaches_the_norm(bad):
    norm, _ = norm_and_scale(lambda grad: np.put(grad, 77_777, bad))
    assert np.isnan(norm) if np.isnan(bad) else np.isinf(norm)
    norm, _ = norm_and_scale(lambda grad: None)
    assert np.isfinite(norm)


def test_squares_do_not_overflow():
    norm, scale = norm_and_scale(lambda grad: grad.__imul__(1e30))
    assert np.isfinite(norm) and 0 < scale < 1e-20
