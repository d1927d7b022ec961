import ml_dtypes
import numpy as np

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16
from handgrad.ops import cast
from handgrad.ops.cast.reference import cast as take_apart
from handgrad.ops.cast.reference import join
from handgrad.testing import case_program, check_op, run_case


def test_cast():
    check_op(cast, [open_backend("cpu")])


def test_the_halves_are_the_float_bit_for_bit():
    """Random bit patterns, ties, the largest finite numbers: kernel and oracle agree, and nothing is lost."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100_000, np.uint64).astype(np.uint32)
    bits = np.concatenate(
        [bits, bits & 0xFFFF0000 | 0x8000, np.array([0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 1], np.uint32)]
    )
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    y, low = take_apart(x)
    assert np.array_equal(join(y, low).view(np.uint32), x.view(np.uint32))
    with np.errstate(over="ignore"):
        nearest = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.mean(y == nearest) > 0.75 and np.all(np.abs(y - x) <= np.abs(nearest - x))  # ties alone may differ
    p, c = case_program(cast, cast.cases[0].__class__({"n": x.size}), BF16)
    got = run_case(p, c, {"x": x}, open_backend("cpu"))
    assert np.array_equal(got["y"].astype(np.float32), y) and np.array_equal(got["low"].astype(np.int16), low)
