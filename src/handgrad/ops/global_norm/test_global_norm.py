import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.ops import global_norm
from handgrad.testing import case_arrays, case_program, check_op, run_case

BACKENDS = [open_backend("cpu"), RefBackend(exact=False)]


def norm_and_scale(change, backend):
    """grad_norm and grad_scale of a case of 100,003 elements whose gradient `change` modifies."""
    p, c = case_program(global_norm, global_norm.cases[2], F32)
    grad = case_arrays(global_norm, c)["grad"]
    change(grad)
    return run_case(p, c, {"grad": grad}, backend)["scalars"][1:]


def test_global_norm():
    check_op(global_norm, [open_backend("cpu")])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_element_makes_the_norm_non_finite_and_the_scale_zero(bad, backend):
    norm, scale = norm_and_scale(lambda grad: np.put(grad, 77_777, bad), backend)
    assert (np.isnan(norm) if np.isnan(bad) else np.isinf(norm)) and scale == 0.0  # no update
    norm, scale = norm_and_scale(lambda grad: None, backend)
    assert np.isfinite(norm) and scale > 0.0


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_squares_do_not_overflow(backend):
    norm, scale = norm_and_scale(lambda grad: grad.__imul__(1e30), backend)
    assert np.isfinite(norm) and 0 < scale < 1e-20
