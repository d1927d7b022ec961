from handgrad.backends import open_backend
from handgrad.ops import attention_decode
from handgrad.testing import check_op


def test_attention_decode():
    check_op(attention_decode, [open_backend("cpu")])
