import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import case
from handgrad.ops import adafactor
from handgrad.testing import case_arrays, case_program, check_case, run_case

CPU = open_backend("cpu", 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adafactor(dtype):
    for e in (e for c in adafactor.cases if not c.real for e in check_case(adafactor, c, CPU, dtype)):
        assert e.ratio <= 1, e


SIZES = dict(start=0, first=0, relative_step=False, decay=0.8, eps=1e-30, clip=1.0, weight_decay=0.0)


def step(M, K, grad, row, col, **changes):
    sizes = SIZES | dict(n=M * K, k=M * K, M=M, K=K, count=M * K) | changes
    p, c = case_program(adafactor, case(**sizes, without="factor"), F32)
    return run_case(p, c, {"p": np.zeros(M * K), "grad": grad.reshape(-1), "row": row, "col": col}, CPU)


def test_rank_one_gradients_are_normalised_exactly():
    """|g| of rank 1 is the product of its factors: each element's step is its sign, times the learning rate 1e-3. State
    that equals the new means stays."""
    rng = np.random.default_rng(0)
    a, b = 0.5 + rng.random(6), 0.5 + rng.random(10)
    grad = np.outer(a, b) * rng.choice([-1.0, 1.0], (6, 10))
    squares = (grad / 2) ** 2  # grad_scale is 1/2
    got = step(6, 10, grad, squares.mean(axis=1), squares.mean(axis=0))
    np.testing.assert_allclose(got["p"], -1e-3 * np.sign(grad).reshape(-1), rtol=2e-6)
    np.testing.assert_allclose(got["row"], squares.mean(axis=1), rtol=1e-6)


def test_step_is_no_larger_than_its_clip():
    """Gradients ten times as large as the state says: the step's RMS is 1, not 10 or so, times the learning rate."""
    grad = np.random.default_rng(0).standard_normal((6, 10))
    small = ((grad / 20) ** 2).mean()
    rms = {clip: np.sqrt((step(6, 10, grad, small, small, clip=clip)["p"] ** 2).mean()) for clip in (1.0, 1e9)}
    assert rms[1.0] == pytest.approx(1e-3, rel=1e-5) and rms[1e9] > 1.1e-3


def test_rows_without_gradients_do_not_move():
    grad = np.random.default_rng(0).standard_normal((6, 10))
    grad[2:4] = 0.0
    got = step(6, 10, grad, np.zeros(6), np.zeros(10))["p"].reshape(6, 10)
    assert not got[2:4].any() and got[[0, 1, 4, 5]].all()


def test_a_vector_is_a_matrix_of_one_row():
    """Its column means are its whole second moment: each element is divided by the root of its own."""
    grad, col = np.random.default_rng(0).standard_normal(50), np.random.default_rng(1).random(50)
    beta = 1 - 2**-0.8  # the second update of the state
    moment = beta * col + (1 - beta) * (grad / 2) ** 2
    u = grad / 2 / np.sqrt(moment)
    wanted = -1e-3 * u / max(1.0, np.sqrt((u**2).mean()))
    np.testing.assert_allclose(step(1, 50, grad, np.zeros(1), col)["p"], wanted, rtol=2e-6)


def test_sizes_that_are_no_matrix_are_rejected():
    with pytest.raises(HandgradError, match="a gradient of 30 elements is M x K, but got 4 x 7"):
        case_program(adafactor, case(n=30, k=30, M=4, K=7, count=30, without="factor", **SIZES), F32)


def test_a_share_is_the_same_bits_as_the_whole():
    """Elements 128 to 383 of a matrix alone, in bf16 with stochastic rounding, and none of them: what ranks do."""
    sizes = SIZES | dict(M=24, K=24, n=576, count=576, weight_decay=0.1, low=False)
    inputs = case_arrays(adafactor, case_program(adafactor, case(k=576, **sizes), BF16)[1])
    found = {}
    for first, k in ((0, 576), (128, 256), (256, 0)):
        p, c = case_program(adafactor, case(k=k, **sizes | dict(first=first, start=first)), BF16)
        found[k] = run_case(p, c, inputs | {"p": inputs["p"][first : first + k]}, CPU)
    assert np.array_equal(found[256]["p"], found[576]["p"][128:384]) and found[0]["p"].size == 0
    assert not np.array_equal(found[256]["p"], inputs["p"][128:384])
    for name in ("row", "col"):
        assert all(np.array_equal(found[k][name], found[576][name]) for k in (256, 0))
