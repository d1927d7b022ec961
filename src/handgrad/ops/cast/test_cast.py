from handgrad.backends import open_backend
from handgrad.ops import cast
from handgrad.testing import check_op


def test_cast():
    check_op(cast, [open_backend("cpu")])
