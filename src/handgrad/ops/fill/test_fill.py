from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.op import MicroBatch
from handgrad.ops import fill
from handgrad.testing import case_arrays, case_program, check_op, run_case


def test_fill():
    check_op(fill, [open_backend("cpu")])


def test_fill_of_zero_adds_nothing_in_a_later_micro_batch():
    p, c = case_program(fill, fill.cases[0], F32)
    arrays = case_arrays(fill, c)
    assert (run_case(p, c, arrays, open_backend("cpu"), micro_batch=MicroBatch(first=False))["x"] == arrays["x"]).all()
