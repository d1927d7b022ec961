import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.ops import dropout
from handgrad.ops.dropout.reference import keep_mask
from handgrad.testing import check_op


def test_dropout():
    check_op(dropout, [open_backend("cpu")])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_keeps_a_fraction_of_one_minus_p(p):
    n = 1_000_000
    kept = keep_mask(np.arange(n), p, seed=1, step=2, micro_step=3, call=4).mean()
    assert abs(kept - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / n)


def test_every_counter_changes_the_dropout_mask():
    start = dict(seed=1, step=2, micro_step=3, call=4)
    masks = [
        keep_mask(np.arange(4096), 0.5, **start | change)
        for change in ({}, {"seed": 2}, {"step": 3}, {"micro_step": 4}, {"call": 5})
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (one == other).mean() < 0.6  # independent masks agree in half of the elements
