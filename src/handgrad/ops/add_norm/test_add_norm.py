import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.backends.cuda.planner import GPUS
from handgrad.core.backward import POLICIES
from handgrad.core.dtypes import BF16, F32, I32
from handgrad.core.op import case
from handgrad.core.params import normal
from handgrad.models import blocks
from handgrad.ops import (
    add_norm,
    add_rms_norm,
    linear,
    lm_loss_forward_backward,
    norm,
    norm_backward,
    rms_norm,
    rms_norm_backward,
)
from handgrad.ops.act import Act
from handgrad.testing import case_arrays, case_program, check_op, gradcheck, run_case, set_scalars, tolerance


@pytest.mark.parametrize("op", [add_norm, norm, norm_backward, add_rms_norm, rms_norm, rms_norm_backward], ids=str)
def test_add_norm(op):
    check_op(op, [open_backend("cpu")])


# PyTorch --------------------------------------------------------------------------------------------------------------


def torch_rms_norm(torch, arrays, dtype, eps):
    """y, and the gradients of s and w from dy, by torch.nn.functional.rms_norm in a dtype, as float64."""
    s, w, dy = (torch.tensor(arrays[name], dtype=dtype) for name in ("s", "w", "dy"))
    s.requires_grad_()
    w.requires_grad_()
    y = torch.nn.functional.rms_norm(s, w.shape, w, eps)
    y.backward(dy)
    return {name: t.detach().double().numpy() for name, t in (("y", y), ("dx", s.grad), ("dw", w.grad))}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("N, C", [(7, 33), (1, 1), (40, 576)])
def test_rms_norm_is_that_of_pytorch(N, C, dtype):
    torch = pytest.importorskip("torch")
    eps, backend = 1e-5, open_backend("cpu")
    working = torch.bfloat16 if dtype is BF16 else torch.float32
    backward = case_program(rms_norm_backward, case(N=N, C=C, without="ds dhb"), dtype)
    arrays = case_arrays(rms_norm_backward, backward[1])
    exact, rounded = (torch_rms_norm(torch, arrays, kind, eps) for kind in (torch.float64, working))
    values = arrays | {"x": arrays["s"], "h": np.zeros((N, C)), "hb": np.zeros(C)}
    alone, added = (case_program(op, case(N=N, C=C, eps=eps), dtype) for op in (rms_norm, add_rms_norm))
    got = run_case(*alone, values, backend)
    got |= run_case(*backward, arrays | {"rstd": got["rstd"]}, backend)
    assert np.array_equal(run_case(*added, values, backend)["y"], got["y"])
    for name in exact:
        kind = F32 if name == "dw" else dtype
        limit = tolerance(exact[name], rounded[name], kind, terms=max(N, C))
        assert np.max(np.abs(got[name] - exact[name])) <= limit, name


# the gradient rules in a model ----------------------------------------------------------------------------------------

N, C, V = 6, 5, 11


def dense(g, x, name, size):
    with g.scope(name):
        w, b = g.param("w", (size, x.shape[1]), normal(1.0)), g.param("b", (size,), normal(1.0))
    return g.emit(linear, x, w, None, None, act=Act.NONE, keep_pre=False)[0], b


def loss(g, x):
    head, targets = g.param("head", (V, C), normal(1.0)), g.input("targets", (N,), I32)
    sizes = {"V": V, "chunks": 1, "scale": 1.0, "softcap": 0.0}
    losses, *_ = g.emit(lm_loss_forward_backward, x, head, targets, None, None, into={"dw": g.grad(head)}, **sizes)
    g.output("losses", losses)


def pre_norm(rms):
    """The first norm reads the residual alone; a block's norms add its branches. The residual is s."""

    def record(g):
        kind = blocks.rms_norm if rms else blocks.layer_norm
        x, h = dense(g, g.input("x", (N, C), F32), "in", C)[0], None
        for i in range(2):
            with g.block(f"h.{i}"):
                for name in ("one", "two"):
                    x, n = kind(g, x, h, name + ".norm", 1e-5)
                    h = dense(g, n, name, C)
        loss(g, kind(g, x, h, "norm", 1e-5)[1])

    return record


def post_norm(rms):
    """As BERT: y is the residual and what the next branch reads; nobody reads s."""

    def record(g):
        kind = blocks.rms_norm if rms else blocks.layer_norm
        x = kind(g, dense(g, g.input("x", (N, C), F32), "in", C)[0], None, "norm", 1e-5)[1]
        for i in range(2):
            with g.block(f"h.{i}"):
                for name in ("one", "two"):
                    x = kind(g, x, dense(g, x, name, C), name + ".norm", 1e-5)[1]
        loss(g, x)

    return record


def difference(record, policy="none"):
    """The largest relative error of a gradient."""

    def fill(p, arena):
        rng = np.random.default_rng(0)
        for t in (*(info.tensor for info in p.params.values()), p.inputs["x"]):
            arena.view(t)[...] = rng.standard_normal(t.shape)
        arena.view(p.inputs["targets"])[...] = rng.integers(0, V, N)
        set_scalars(p, arena)

    return gradcheck(record, fill, POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("kind", [pre_norm, post_norm], ids=["pre", "post"])
def test_gradients_equal_finite_differences(kind, rms, policy):
    assert difference(kind(rms), policy) < 1e-6


@pytest.mark.parametrize("kind", [pre_norm, post_norm], ids=["pre", "post"])
@pytest.mark.parametrize("rms, op", [(False, norm_backward), (True, rms_norm_backward)], ids=["layer", "rms"])
def test_wrong_gradient_rule_is_caught(monkeypatch, kind, rms, op):
    right = type(op).ref
    monkeypatch.setattr(type(op), "ref", lambda self, v: tuple(1.01 * out for out in right(self, v)))
    assert difference(kind(rms)) > 1e-4


# CUDA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, sums", [(norm_backward, 2), (rms_norm_backward, 1)], ids=str)
def test_column_sums_of_a_gpu_are_those_that_are_written(op, sums):
    """dw, and db of a layer norm; dhb where it is wanted. Scratch and the summing kernel's grid follow."""
    for C, without, count in [(768, "dhb", sums), (768, "", sums + 1), (2048, "dhb", sums), (33, "", sums + 1)]:
        launches = op.cuda(case_program(op, case(N=4096, C=C, without=without), BF16)[1], GPUS["h100"])
        rows, add = launches.steps
        assert rows.defines["SUMS"] == add.defines["SUMS"] == count
        assert launches.scratch == rows.grid * count * C * 4 and add.grid == -(-count * C // 32)
