from handgrad.backends import open_backend
from handgrad.ops import loss_sum
from handgrad.testing import check_op


def test_loss_sum():
    check_op(loss_sum, [open_backend("cpu")])
