import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.ops import share_norm
from handgrad.testing import case_arrays, case_program, check_op, run_case


def test_share_norm():
    check_op(share_norm, [open_backend("cpu")])


@pytest.mark.parametrize("backend", [open_backend("cpu"), RefBackend(exact=False)], ids=lambda b: b.name)
@pytest.mark.parametrize("factor", [1e30, np.inf, np.nan])
def test_squares_do_not_overflow_and_non_finite_values_reach_the_norm(backend, factor):
    p, c = case_program(share_norm, share_norm.cases[2], F32)
    x = case_arrays(share_norm, c)["x"]
    x[77_777] *= factor
    norm = run_case(p, c, {"x": x}, backend)["y"][0]
    want = np.sqrt((x**2).sum())
    assert np.isfinite(norm) == np.isfinite(want) and (not np.isfinite(want) or abs(norm / want - 1) < 1e-6)
