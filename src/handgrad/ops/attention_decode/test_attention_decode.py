from types import SimpleNamespace

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import Case
from handgrad.ops import attention_decode
from handgrad.ops.attention import reference
from handgrad.testing import case_arrays, case_program, check_op, set_scalars


def test_attention_decode():
    check_op(attention_decode, [open_backend("cpu")])


@pytest.mark.parametrize(("window", "buckets"), [*((window, 0) for window in (0, 1, 40, 64, 500)), (0, 32), (140, 8)])
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("T", (1, 30))
def test_any_position_equals_attention(T, dtype, window, buckets):
    """y from a full cache equals the rows of attention over the whole text."""
    S, H, K, D = 200, 2, 1, 24
    sizes = {"N": T, "Q": (H + 2 * K) * D, "T": T, "S": S, "H": H, "K": K, "window": window, "scale": 0.3, "R": buckets}
    p, c = case_program(attention_decode, Case(sizes, without=() if buckets else ("rel",)), dtype)
    arrays = case_arrays(attention_decode, c)
    text = np.random.default_rng(1).standard_normal((S, sizes["Q"]))
    text[:, H * D :] = arrays["cache"].reshape(S, -1)
    for backend in (open_backend("ref"), open_backend("cpu")):
        for position in (0, 39, 40, 41, 64, 128, 129, S - T):
            text[position : position + T] = arrays["qkv"]
            v = SimpleNamespace(qkv=text, B=1, T=S, S=S, H=H, K=K, D=D, causal=True, window=window, scale=0.3, p=0.0)
            v.kv = v.first_key = v.last_key = None
            v.rel = arrays.get("rel")
            want = reference.attention_forward(v)[0][position : position + T]
            text[:, H * D :] = arrays["cache"].reshape(S, -1)
            arena = backend.alloc(backend.plan(p))
            for name, values in arrays.items():
                arena.write(getattr(c, name), values)
            set_scalars(p, arena)
            arena.write_scalars(p, position=position)
            backend.bind(p, arena).run()
            limit = (1e-5 if dtype is F32 else 2 * BF16.unit) * np.abs(want).max()  # bf16: probabilities and y
            np.testing.assert_allclose(arena.read(c.y), want, rtol=0, atol=limit)
