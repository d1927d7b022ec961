import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import pick, pick_backward
from handgrad.testing import case_arrays, case_program, check_op, run_case


@pytest.mark.parametrize("op", [pick, pick_backward], ids=str)
def test_pick(op):
    check_op(op, [open_backend("cpu")])


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_picked_rows_equal_torch(dtype):
    """F.embedding of the rows that are not padding, with its gradient: forward to the bit, sums in float32."""
    torch = pytest.importorskip("torch")
    N, C, M = 40, 24, 90
    p, c = case_program(pick, case(N=N, C=C, M=M), dtype)
    arrays = case_arrays(pick, c)
    rows = torch.tensor(arrays["rows"]).long()
    x = torch.tensor(arrays["x"]).requires_grad_()
    counts = (rows >= 0)[:, None]
    y = torch.nn.functional.embedding(rows.clamp(min=0), x) * counts
    np.testing.assert_array_equal(run_case(p, c, arrays, open_backend("cpu"))["y"], y.detach())
    p, c = case_program(pick_backward, case(N=N, C=C, M=M), dtype)
    arrays = {"dy": case_arrays(pick_backward, c)["dy"], "rows": arrays["rows"]}
    (dx,) = torch.autograd.grad(y, x, torch.tensor(arrays["dy"]))
    got = run_case(p, c, arrays, open_backend("cpu"))["dx"]
    np.testing.assert_allclose(got, dx, rtol=2 * dtype.unit, atol=1e-5)


def test_rows_that_nothing_picks_and_padding_get_no_gradient():
    p, c = case_program(pick_backward, case(N=6, C=8, M=4), F32)
    arrays = {"dy": np.ones((4, 8)), "rows": np.array([5, -1, 2, 5], np.int32)}
    dx = run_case(p, c, arrays, open_backend("cpu"))["dx"]
    assert dx[:, 0].tolist() == [0, 0, 1, 0, 0, 2]
