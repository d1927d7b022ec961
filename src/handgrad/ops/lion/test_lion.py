import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import lion
from handgrad.testing import case_program, check_case, run_case

CPU = open_backend("cpu", 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lion(dtype):
    for e in (e for c in lion.cases if not c.real for e in check_case(lion, c, CPU, dtype)):
        assert e.ratio <= 1, e


def test_steps_are_signs():
    """Every weight moves by the learning rate, in the direction of the interpolation and not of the momentum; one that
    never had a gradient stays."""
    p, c = case_program(lion, case(n=4, start=0, beta1=0.5, beta2=0.75, weight_decay=0.0), F32)
    arrays = {"p": np.zeros(4), "m": np.array([1.0, 1.0, -1e-30, 0.0]), "grad": np.array([4.0, -4.0, 0.0, 0.0])}
    got = run_case(p, c, arrays, CPU)  # grad_scale is 1/2
    np.testing.assert_allclose(got["p"], [-1e-3, 1e-3, 1e-3, 0.0], rtol=2**-23)
    np.testing.assert_allclose(got["m"], [1.25, 0.25, -0.75e-30, 0.0], rtol=2**-22)
