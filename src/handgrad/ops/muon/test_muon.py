from handgrad.backends import open_backend
from handgrad.ops import muon, muon_momentum
from handgrad.testing import check_op


def test_muon():
    check_op(muon, [open_backend("cpu")])
