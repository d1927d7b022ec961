import pytest

from handgrad.backends import open_backend
from handgrad.ops import lm_loss, lm_loss_forward_backward
from handgrad.testing import check_op


@pytest.mark.parametrize("op", [lm_loss, lm_loss_forward_backward], ids=str)
def test_lm_loss(op):
    check_op(op, [open_backend("cpu")])
