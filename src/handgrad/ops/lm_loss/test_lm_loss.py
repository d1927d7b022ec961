import platform
import shutil

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.ops import lm_loss, lm_loss_forward_backward
from handgrad.testing import case_arrays, case_program, check_op, run_case, tolerance


@pytest.mark.parametrize("op", [lm_loss, lm_loss_forward_backward], ids=str)
def test_lm_loss(op):
    check_op(op, [open_backend("cpu")])


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
