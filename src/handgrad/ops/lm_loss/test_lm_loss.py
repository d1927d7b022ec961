import platform
import shutil

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import case
from handgrad.ops import lm_loss, lm_loss_forward_backward
from handgrad.testing import case_arrays, case_program, check_op, run_case, tolerance


@pytest.mark.parametrize("op", [lm_loss, lm_loss_forward_backward], ids=str)
def test_lm_loss(op):
    check_op(op, [open_backend("cpu")])


@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (0.5, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("without", ["b weights db", "weights", "b db", ""])
def test_losses_and_gradients_equal_torch(without, scale, softcap):
    """cross_entropy without reduction, with ignored rows, times the weights; gradients of loss_scale * sum."""
    torch = pytest.importorskip("torch")
    sizes = case(N=23, C=24, Vp=40, V=37, chunks=3, scale=scale, softcap=softcap, without=without)
    p, c = case_program(lm_loss_forward_backward, sizes, F32)
    arrays = case_arrays(lm_loss_forward_backward, c)
    got = run_case(p, c, arrays, open_backend("cpu"))
    t = {name: torch.tensor(value) for name, value in arrays.items()}
    leaves = [t[name].requires_grad_() for name in ("x", "w", "b") if name in t]
    z = scale * (t["x"] @ t["w"].T + t.get("b", 0))
    z = (softcap * torch.tanh(z / softcap) if softcap else z)[:, :37]
    losses = torch.nn.functional.cross_entropy(z, t["targets"].long(), ignore_index=-1, reduction="none")
    losses = losses * t.get("weights", 1)
    grads = torch.autograd.grad(0.125 * losses.sum(), leaves)
    np.testing.assert_allclose(got["losses"], losses.detach(), rtol=2e-6, atol=2e-6)
    for name, g in zip(("dx", "dw", "db"), grads):
        np.testing.assert_allclose(got[name], g, atol=2e-6 * float(g.abs().max()))


@pytest.mark.parametrize("extra", [{}, {"scale": 0.5}, {"softcap": 3.0}, {"without": "weights"}, {"without": "b db"}])
def test_exponentials_serve_only_plain_heads(extra):
    """exp_gemm.cu stores exponentials of x w^T, so it knows no bias, scale, cap or weights."""
    from handgrad.backends.cuda.planner import GPUS

    plain = dict(N=70, C=512, Vp=520, V=513, chunks=2, scale=1.0, softcap=0.0, without="b weights db")
    call = case_program(lm_loss_forward_backward, case(**plain | extra), BF16)[1]
    note = lm_loss_forward_backward.cuda(call, GPUS["h100"]).note
    assert note == ("" if extra else "softmax in the GEMM")


def test_ignored_row_has_no_loss_and_no_gradient_whatever_its_weight():
    sizes = case(N=9, C=16, Vp=24, V=24, chunks=2, scale=1.0, softcap=0.0)
    p, c = case_program(lm_loss_forward_backward, sizes, F32)
    arrays = case_arrays(lm_loss_forward_backward, c)
    arrays["weights"][4] = np.nan  # row 4 is ignored
    assert arrays["targets"][4] == -1
    got = run_case(p, c, arrays, open_backend("cpu"))
    assert got["losses"][4] == 0 and not got["dx"][4].any() and np.isfinite(got["dw"]).all()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="the emulator needs both")
@pytest.mark.parametrize("size", [1, 32], ids=["small", "some losses above 69 nats"])
def test_exponentials_of_large_logits(size):
    """Stored exponentials are relative to the target's logit: rows in which they overflow are recomputed."""
    from tests.emulator import EmulatedBackend

    p, c = case_program(lm_loss_forward_backward, next(c for c in lm_loss.cases if c.sizes["C"] == 512), BF16)
    arrays = case_arrays(lm_loss_forward_backward, c)
    arrays["x"] = arrays["x"] * size
    backends = RefBackend(), RefBackend(exact=False), EmulatedBackend()
    exact, rounded, got = (run_case(p, c, arrays, b) for b in backends)
    assert exact["losses"].max() > 140 or size == 1
    for name in ("losses", "dx", "dw"):
        limit = tolerance(exact[name], rounded[name], F32 if name != "dx" else BF16, terms=520)
        assert np.abs(got[name] - exact[name]).max() <= limit, name
