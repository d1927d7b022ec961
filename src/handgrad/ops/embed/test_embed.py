from handgrad.backends import open_backend
from handgrad.ops import embed, embed_backward
from handgrad.testing import check_op


def test_embed():
    check_op(embed, [open_backend("cpu")])


def test_embed_backward():
    check_op(embed_backward, [open_backend("cpu")])
