"""No kernel's result depends on the number of threads: every op, every case, bit for bit."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.ops import OPS
from handgrad.testing import case_arrays, case_program, run_case


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_results_are_the_same_on_any_number_of_threads(op, dtype):
    for case in (c for c in op.cases if not c.real):
        p, c = case_program(op, case, DTYPES[dtype])
        arrays = case_arrays(op, c)
        one, *others = (run_case(p, c, arrays, open_backend("cpu", threads)) for threads in (1, 2, 5))
        for more in others:
            assert all(np.array_equal(one[name], more[name]) for name in one), case.sizes
