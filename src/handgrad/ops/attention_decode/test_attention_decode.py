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


@pytest.mark.parametrize("window", (0, 1, 40, 64, 500))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("T", (1, 30))
def test_windows_at_any_position_equal_attention(T, dtype, window):
    """y from a full cache equals the rows of attention over the whole text."""
    S, H, K, D = 200, 2, 1, 24
    sizes = {"N": T, "Q": (H + 2 * K) * D, "T": T, "S": S, "H": H, "K": K, "window": window, "scale": 0.3}
    p, c = case_program(attention_decode, Case(sizes), dtype)
    arrays = case_arrays(attention_decode, c)
    text = np.random.default_rng(1).standard_normal((S, sizes["Q"]))
    text[:, H * D :] = arrays["cache"].reshape(S, -1)
    for backend in (open_backend("ref"), open_backend("cpu")):
        for position in (0, 39, 40, 41, 64, 128, 129, S - T):
            text[position : position + T] = arrays["qkv"]
            v = SimpleNamespace(qkv=text, B=1, T=S, S=S, H=H, K=K, D=D, causal=True, window=window, scale=0.3, p=0.0)
            v.kv = v.rel = v.first_key = v.last_key = None
            want = reference.attention_forward(v)[0][position : position + T]
            text[:, H * D :] = arrays["cache"].reshape(S, -1)
            arena = backend.alloc(backend.plan(p))
            for tensor, name in ((c.qkv, "qkv"), (c.cache, "cache")):
                arena.write(tensor, arrays[name])
            set_scalars(p, arena)
            arena.write_scalars(p, position=position)
            backend.bind(p, arena).run()
            limit = (1e-5 if dtype is F32 else 2 * BF16.unit) * np.abs(want).max()  # bf16: probabilities and y
            np.testing.assert_allclose(arena.read(c.y), want, rtol=0, atol=limit)
