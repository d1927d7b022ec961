import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32
from handgrad.core.op import case
from handgrad.ops import embed, embed_backward
from handgrad.testing import case_arrays, case_program, check_op, run_case


def test_embed():
    check_op(embed, [open_backend("cpu")])


def test_embed_backward():
    check_op(embed_backward, [open_backend("cpu")])


@pytest.mark.parametrize("scale", [1.0, 5.5])
@pytest.mark.parametrize("without", ["", "positions", "wpe positions"])
def test_embed_equals_torch(without, scale):
    """F.embedding of both tables, with their gradients; positions that are given start anew in the middle of a row."""
    torch = pytest.importorskip("torch")
    N, C, V, Tmax, T = 24, 20, 7, 12, 8
    p, c = case_program(embed, case(N=N, C=C, V=V, Tmax=Tmax, T=T, decode=False, scale=scale, without=without), F32)
    arrays = case_arrays(embed, c)
    if "positions" in arrays:
        arrays["positions"] = np.concatenate([np.arange(n) for n in (5, 12, 7)]).astype(np.int32)
    places = torch.tensor(arrays.get("positions", np.arange(N) % T)).long()
    tables = {n: torch.tensor(arrays[n]).requires_grad_() for n in ("wte", "wpe") if n in arrays}
    y = scale * torch.nn.functional.embedding(torch.tensor(arrays["ids"]).long(), tables["wte"])
    y = y + torch.nn.functional.embedding(places, tables["wpe"]) if "wpe" in tables else y
    np.testing.assert_allclose(run_case(p, c, arrays, open_backend("cpu"))["y"], y.detach(), rtol=1e-6, atol=1e-6)
    sizes = case(N=N, C=C, V=V, Tmax=Tmax if "wpe" in tables else 0, T=T, scale=scale, without=without)
    p, c = case_program(embed_backward, sizes, F32)
    arrays["dy"] = case_arrays(embed_backward, c)["dy"]
    grads = torch.autograd.grad(y, list(tables.values()), torch.tensor(arrays["dy"]))
    got = run_case(p, c, arrays, open_backend("cpu"))
    for name, g in zip(tables, grads):
        np.testing.assert_allclose(got[f"d{name}"], g, rtol=1e-5, atol=1e-5)
