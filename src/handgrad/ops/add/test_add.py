from handgrad.backends import open_backend
from handgrad.ops import add
from handgrad.testing import check_op


def test_add():
    check_op(add, [open_backend("cpu")])
