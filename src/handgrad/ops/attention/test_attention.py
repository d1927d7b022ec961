from types import SimpleNamespace

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.cpu import CpuBackend
from handgrad.core.dtypes import BF16, F32
from handgrad.core.errors import HandgradError
from handgrad.core.op import Case
from handgrad.ops import attention, attention_backward
from handgrad.ops.attention import reference
from handgrad.ops.attention.op import CASES
from handgrad.testing import case_arrays, case_program, check_op, run_case

MASKED = [c for c in CASES if c.sizes["p"] == 0 and not c.real]
BOUNDED = [c for c in CASES if {"first_key", "last_key"} - {*c.without}]


@pytest.mark.parametrize("op", [attention, attention_backward], ids=str)
def test_attention(op):
    check_op(op, [open_backend("cpu")])


def operands(case, op=attention):
    """What the oracle reads in a case: sizes, attributes, inputs."""
    c = case_program(op, case, F32)[1]
    absent = dict.fromkeys(("kv", "rel", "first_key", "last_key"))
    return SimpleNamespace(**absent | c.sizes | c.attrs | case_arrays(op, c), scalars=None)


@pytest.mark.parametrize("case", MASKED, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.sizes.items()))
def test_equals_torch_with_an_explicit_mask(case):
    """Forward and every gradient equal those of scaled_dot_product_attention, whose mask holds biases and -inf."""
    torch = pytest.importorskip("torch")
    v = operands(case)
    q, k, values = (torch.tensor(x.copy(), requires_grad=True) for x in reference.split_qkv(v))
    rel = None if v.rel is None else torch.tensor(v.rel, requires_grad=True)
    bias = 0.0 if rel is None else rel[torch.tensor(reference.buckets(v))].permute(2, 0, 1)
    seen = torch.tensor(reference.visible(v))
    sees = seen.any(-1, keepdim=True)  # torch's y is NaN for a query that sees nothing; here its mask is all zeros
    mask = (torch.zeros(v.B, v.H, v.T, v.S, dtype=torch.float64) + bias).masked_fill(~seen & sees, -torch.inf)
    attend = torch.nn.functional.scaled_dot_product_attention
    y = attend(q, k, values, attn_mask=mask, scale=float(np.float32(v.scale))) * sees
    v.dy = np.random.default_rng(3).standard_normal((v.N, v.C))
    y.backward(torch.tensor(reference.split_heads(v.dy, v.T, v.H)))

    v.y, v.lse = reference.attention_forward(v)
    np.testing.assert_allclose(v.y, reference.join_heads(y.detach().numpy()), rtol=0, atol=1e-11)
    dqkv, dkv, drel = reference.attention_backward(v)
    keys = dqkv[:, v.C :] if dkv is None else dkv
    want = [q.grad.numpy(), *(reference.sum_groups(x.grad.numpy(), v.K) for x in (k, values))]
    for got, exact in zip((dqkv[:, : v.C], *np.split(keys, 2, axis=-1)), want):
        np.testing.assert_allclose(got, reference.join_heads(exact), rtol=0, atol=1e-11 * (1 + np.abs(exact).max()))
    if rel is not None:
        np.testing.assert_allclose(drel, rel.grad.numpy(), rtol=0, atol=1e-11 * np.abs(drel).max())


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("R", (32, 8, 64))
def test_buckets_equal_transformers(causal, R):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-300, 301)
    want = t5.T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=not causal, num_buckets=R, max_distance=reference.FAR
    )
    assert [reference.bucket(int(d), R, causal) for d in distances] == want.tolist()


def test_buckets_of_t5():
    """Computed from the formula of the paper's code, independently of this code."""
    both = dict(zip((-128, -64, -32, -16, -9, -8, -1, 0, 1, 7, 8, 12, 16, 23, 32, 64, 91, 128),
                    (15, 14, 12, 10, 8, 8, 1, 0, 17, 23, 24, 25, 26, 27, 28, 30, 31, 31)))  # fmt: skip
    before = dict(zip((-200, -128, -64, -32, -16, -9, -1, 0, 5), (31, 31, 26, 21, 16, 9, 1, 0, 0)))
    assert {d: reference.bucket(d, 32, False) for d in both} == both
    assert {d: reference.bucket(d, 32, True) for d in before} == before


PLAIN = {"H": 1, "K": 1, "p": 0.0, "stream": 1}


@pytest.mark.parametrize("R", (4, 8, 32, 64, 128))
@pytest.mark.parametrize("causal", (True, False))
def test_cpu_has_the_buckets_of_the_oracle(R, causal):
    """Where q is 0, scores are biases: a wrong bucket of any distance shows in y."""
    T = 300
    sizes = PLAIN | {"N": T, "Q": 12, "R": R, "T": T, "causal": causal, "window": 0, "scale": 1.0}
    p, c = case_program(attention, Case(sizes, without=("kv", "first_key", "last_key")), F32)
    qkv = np.zeros((T, 12))
    qkv[:, 8] = np.arange(T) / T
    arrays = {"qkv": qkv, "rel": np.arange(R)[:, None] * 0.37 % 3.0}
    want, got = (run_case(p, c, arrays, open_backend(name))["y"] for name in ("ref", "cpu"))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("case", BOUNDED, ids=lambda c: f"T{c.sizes['T']}-{c.sizes['p']:g}")
def test_a_query_that_sees_nothing(case, dtype):
    """y and lse are 0, and so is every gradient that it contributes, whatever dy holds."""
    v = operands(case)
    sees = reference.visible(v).any(-1).reshape(-1)
    assert not sees.all()
    p, c = case_program(attention, case, dtype)
    out = run_case(p, c, case_arrays(attention, c), open_backend("cpu"))
    assert not out["y"][~sees].any()
    assert not out["lse"].swapaxes(1, 2).reshape(v.N, v.H)[~sees].any()
    p, c = case_program(attention_backward, case, dtype)
    arrays = case_arrays(attention_backward, c)
    one = run_case(p, c, arrays, open_backend("cpu"))
    assert not one["dqkv"][~sees, : v.C].any()
    arrays["dy"][~sees] *= -3
    other = run_case(p, c, arrays, open_backend("cpu"))
    assert all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("given", ("rel", "first_key", "kv"))
def test_bits_do_not_depend_on_threads(given):
    for op in (attention, attention_backward):
        for case in (c for c in CASES if given not in c.without):
            p, c = case_program(op, case, BF16)
            one, two = (run_case(p, c, case_arrays(op, c), CpuBackend(n)) for n in (1, 2))
            assert all(np.array_equal(one[k], two[k]) for k in one), case


def test_keys_outside_the_window_are_not_read():
    """NaN in keys and values that no query of a block sees changes nothing: their tiles are skipped."""
    sizes = PLAIN | {"N": 512, "Q": 24, "T": 512, "causal": True, "window": 64, "scale": 0.3}
    p, c = case_program(attention, Case(sizes, without=("kv", "rel", "first_key", "last_key")), F32)
    arrays = case_arrays(attention, c)
    y = run_case(p, c, arrays, open_backend("cpu"))["y"]
    arrays["qkv"][:64, 8:] = np.nan
    assert np.array_equal(run_case(p, c, arrays, open_backend("cpu"))["y"][192:], y[192:])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"R": 6}, "rel has a multiple of 4 buckets, at most 128, but got 6"),
        ({"R": 256}, "rel has a multiple of 4 buckets, at most 128, but got 256"),
        ({"E": 12, "M": 8}, "the width of kv is 2 x 1 heads of 24, but got 12"),
        ({"E": 48, "M": 9}, "kv has the same number of rows for each of 2 sequences, but got 9"),
        ({"Q": 25}, "the width of qkv is a multiple of 1"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(HandgradError, match=message):
        attention.derive({"N": 8, "T": 4, "H": 1, "K": 1, "Q": 24} | changes)


@pytest.mark.parametrize("causal, window", [(True, 0), (False, 0), (True, 4), (True, 1), (True, 20)])
def test_flops_count_what_queries_see(causal, window):
    sizes = PLAIN | {"N": 18, "Q": 12, "T": 9, "causal": causal, "window": window, "scale": 1.0}
    case = Case(sizes, without=("kv", "rel", "first_key", "last_key"))
    c = case_program(attention, case, F32)[1]
    assert attention.flops(c) == 2 * 2 * reference.visible(operands(case)).sum() * 4
