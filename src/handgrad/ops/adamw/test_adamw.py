from handgrad.backends import open_backend
from handgrad.ops import adamw
from handgrad.testing import check_op


def test_adamw():
    check_op(adamw, [open_backend("cpu")])
