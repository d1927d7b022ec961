import pytest

from handgrad.backends import open_backend
from handgrad.ops import add_norm, norm, norm_backward
from handgrad.testing import check_op


@pytest.mark.parametrize("op", [add_norm, norm, norm_backward], ids=str)
def test_add_norm(op):
    check_op(op, [open_backend("cpu")])
