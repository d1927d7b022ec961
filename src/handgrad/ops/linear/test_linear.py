import pytest

from handgrad.backends import open_backend
from handgrad.ops import linear, linear_backward_w, linear_backward_x, linear_gelu, linear_gelu_backward
from handgrad.testing import check_op


@pytest.mark.parametrize(
    "op", [linear, linear_backward_w, linear_backward_x, linear_gelu, linear_gelu_backward], ids=str
)
def test_linear(op):
    check_op(op, [open_backend("cpu")])
