import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import rms, rms_of_ranks
from handgrad.testing import case_arrays, case_program, check_case, run_case

CPU = open_backend("cpu", 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", [rms, rms_of_ranks], ids=str)
def test_rms(op, dtype):
    for e in (e for c in op.cases if not c.real for e in check_case(op, c, CPU, dtype)):
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


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pieces_have_the_size_of_the_whole(dtype):
    """What three ranks find of elements 0 to 16, of none and of 17 to 32. Each piece is rounded to float32: by 2^-24 of
    itself, and so is y; the sum of their squares by no more than twice the same part of it."""
    p, c = case_program(rms, rms.cases[0], dtype)
    arrays = case_arrays(rms, c)
    found = []
    for span in (slice(0, 17), slice(17, 17), slice(17, 33)):
        program, call = case_program(rms, case(n=len(range(33)[span]), count=33, least=0.0), dtype)
        part = {name: arrays[name][span] for name in ("p", "low") if name in arrays}
        found.append(run_case(program, call, part, CPU)["y"])
    assert found[1] == 0.0
    program, call = case_program(rms_of_ranks, case(W=3, k=1, least=1e-3), dtype)
    y = run_case(program, call, {"x": np.array(found)}, CPU)["y"]
    np.testing.assert_allclose(y, run_case(p, c, arrays, CPU)["y"], rtol=3 * 2**-24)
