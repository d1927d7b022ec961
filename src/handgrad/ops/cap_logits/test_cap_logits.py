import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32, I32
from handgrad.core.op import case
from handgrad.core.params import ZEROS
from handgrad.core.program import Program
from handgrad.models.blocks import lm_head_logits, lm_head_loss
from handgrad.ops import cap_logits
from handgrad.testing import case_program, check_op, run_case


def test_cap_logits():
    check_op(cap_logits, [open_backend("cpu")])


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_capped_logits_keep_their_order_and_their_bound(dtype):
    """Sampling needs both: whatever is finite lies within softcap, and infinities are at it."""
    p, c = case_program(cap_logits, case(N=1, V=64, scale=1.0, softcap=30.0), dtype)
    z = np.concatenate([[-np.inf, -1e30], np.linspace(-100, 100, 60), [1e30, np.inf]])[None]
    y = run_case(p, c, {"z": z}, open_backend("cpu"))["y"][0]
    assert y[0] == y[1] == -30 and y[-1] == y[-2] == 30
    assert (np.diff(y) >= 0).all() and (np.diff(y[20:44]) > 0).all()


@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (0.5, 0.0), (1.0, 2.0), (0.5, 2.0)])
def test_losses_are_those_of_the_logits_that_are_sampled(scale, softcap):
    """The same head by lm_head_loss and by lm_head_logits, with an output bias, in float64."""
    N, C, Vp, V = 5, 6, 16, 13
    p, head, rng = Program(F32), dict(scale=scale, softcap=softcap), np.random.default_rng(0)
    w, b = p.param("w", (Vp, C), ZEROS), p.param("b", (Vp,), ZEROS)
    x, targets, weights = p.input("x", (N, C), F32), p.input("targets", (N,), I32), p.input("weights", (N,), F32)
    logits = lm_head_logits(p, x, w, b=b, **head)
    losses = lm_head_loss(p, x, w, targets, vocab_size=V, chunks=2, b=b, weights=weights, **head)
    backend = RefBackend()
    arena = backend.alloc(backend.plan(p))
    for t in (w, b, x, weights):
        arena.view(t)[...] = rng.standard_normal(t.shape)
    arena.view(targets)[...] = chosen = rng.integers(0, V, N)
    backend.bind(p, arena).run()
    z = arena.view(logits)[:, :V]
    nats = np.log(np.exp(z).sum(1)) - z[np.arange(N), chosen]
    np.testing.assert_allclose(arena.view(losses), nats * arena.view(weights), rtol=1e-12)
