import pytest

from handgrad.backends import open_backend
from handgrad.ops import attention, attention_backward
from handgrad.testing import check_op


@pytest.mark.parametrize("op", [attention, attention_backward], ids=str)
def test_attention(op):
    check_op(op, [open_backend("cpu")])
