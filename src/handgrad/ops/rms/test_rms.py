import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import rms
from handgrad.testing import case_program, check_case, run_case

CPU = open_backend("cpu", 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rms(dtype):
    for e in (e for c in rms.cases if not c.real for e in check_case(rms, c, CPU, dtype)):
        assert e.ratio <= 1, e


def test_low_halves_count():
    """Equal weights between two bf16 numbers: without their low halves all would be off the same way, by up to 2^-9."""
    from handgrad.ops.adamw.reference import split_weight

    x = np.full(100, 1.003, np.float32)
    y, low = split_weight(x)
    p, c = case_program(rms, case(n=100, count=100, least=0.0), BF16)
    assert run_case(p, c, {"p": y, "low": low}, CPU)["y"] == pytest.approx(1.003, rel=2**-23)
    assert run_case(p, c, {"p": y, "low": 0 * low}, CPU)["y"] != pytest.approx(1.003, rel=2**-12)


def test_padding_does_not_count_and_zeros_have_a_size():
    p, c = case_program(rms, case(n=8, count=4, least=0.125, without="low"), F32)
    assert run_case(p, c, {"p": np.array([3.0] * 4 + [0.0] * 4)}, CPU)["y"] == 3.0
    assert run_case(p, c, {"p": np.zeros(8)}, CPU)["y"] == 0.125
