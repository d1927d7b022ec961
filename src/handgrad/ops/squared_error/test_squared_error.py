import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import case
from handgrad.core.program import Program
from handgrad.ops import squared_error, squared_error_forward_backward
from handgrad.testing import case_arrays, case_program, check_op, run_case


@pytest.mark.parametrize("op", [squared_error, squared_error_forward_backward], ids=str)
def test_squared_error(op):
    check_op(op, [open_backend("cpu")])


def test_losses_and_gradients_equal_torch():
    torch = pytest.importorskip("torch")
    p, c = case_program(squared_error_forward_backward, case(N=23, O=1), F32)
    arrays = case_arrays(squared_error_forward_backward, c)
    got = run_case(p, c, arrays, open_backend("cpu"))
    counts = torch.tensor(arrays["targets"] >= 0)
    z = torch.tensor(arrays["z"], requires_grad=True)
    losses = torch.nn.functional.mse_loss(z[:, 0], torch.tensor(arrays["values"]), reduction="none") * counts
    (dz,) = torch.autograd.grad(0.125 * losses.sum(), z)
    np.testing.assert_allclose(got["losses"], losses.detach(), rtol=1e-6)
    np.testing.assert_allclose(got["dz"], dz, rtol=1e-6)


def test_an_ignored_row_has_no_loss_whatever_it_holds():
    p, c = case_program(squared_error_forward_backward, case(N=7, O=1), F32)
    arrays = case_arrays(squared_error_forward_backward, c)
    arrays["values"][4] = np.nan  # row 4 is ignored
    got = run_case(p, c, arrays, open_backend("cpu"))
    assert got["losses"][4] == 0 and got["dz"][4] == 0 and np.isfinite(got["losses"]).all()


def test_several_predictions_a_row_are_refused():
    with pytest.raises(HandgradError, match="squared_error reads one prediction a row, but got 2"):
        case_program(squared_error, case(N=7, O=2), Program(F32).dtype)
