import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import ema
from handgrad.ops.adamw.reference import split_weight
from handgrad.testing import case_arrays, case_program, check_op, set_scalars


def test_ema():
    check_op(ema, [open_backend("cpu")])


def averages(weights, decay, dtype=F32, first=1, grad_scale=1.0):
    """The average after each of the steps, from the weights of step 0 on; weights: float32, one row a step."""
    backend, n = open_backend("cpu"), weights.shape[1]
    p, c = case_program(ema, case(n=n, decay=decay, without="" if dtype is BF16 else "low"), dtype)
    arena, found = backend.alloc(backend.plan(p)), []
    run = backend.bind(p, arena)
    arena.write(c.average, weights[0])
    set_scalars(p, arena)
    for step, w in enumerate(weights[1:], first):
        halves = split_weight(w) if dtype is BF16 else (w,)
        for t, half in zip((c.p, c.low), halves):
            arena.write(t, half)
        arena.write_scalars(p, step=step, grad_scale=grad_scale)
        run.run()
        found.append(np.array(arena.read(c.average), np.float64))
    return found


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_average_is_the_weighted_mean_of_all_weights(dtype):
    """Against the sum of w_s (1 - keep_s) prod_{u > s} keep_u in float64; bf16 averages the float32 weights."""
    rng = np.random.default_rng(0)
    weights, decay = rng.standard_normal((31, 70)).astype(np.float32), 0.6  # reached at step 13
    keep = np.array([1.0, *(min(decay, (1 + t) / (10 + t)) for t in range(1, 31))])
    assert keep[12] < decay == keep[13]
    for t, found in enumerate(averages(weights, decay, dtype), 1):
        tails = np.array([np.prod(keep[s + 1 : t + 1]) for s in range(t + 1)])
        shares = tails * np.where(np.arange(t + 1) == 0, 1.0, 1 - keep[: t + 1])
        assert shares.sum() == pytest.approx(1.0)
        # three roundings a step of values below 4, of which at most 1 / (1 - 0.6) steps remain
        np.testing.assert_allclose(found, shares @ weights[: t + 1], rtol=0, atol=3 * 2.5 * 4 * 2**-24)


def test_torch_has_the_same_average():
    """AveragedModel, whose first update copies the weights; at steps at which the decay is constant."""
    torch = pytest.importorskip("torch")
    weights = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    module = torch.nn.Linear(5, 1, bias=False)
    judge = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for w in weights:
        with torch.no_grad():
            module.weight.copy_(torch.tensor(w)[None])
        judge.update_parameters(module)
    expected = judge.module.weight.detach().numpy()[0]
    np.testing.assert_allclose(averages(weights, 0.9, first=1000)[-1], expected, rtol=1e-6, atol=1e-6)


def test_a_step_without_update_changes_no_bit():
    arrays = case_arrays(ema, case_program(ema, case(n=33, decay=0.5), F32)[1])
    start = arrays["average"].astype(np.float32)
    weights = np.stack([start, np.full(33, np.nan, np.float32)])
    assert np.array_equal(averages(weights, 0.5, grad_scale=0.0)[0], start)
