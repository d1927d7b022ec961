import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import F32, I32
from handgrad.core.params import normal
from handgrad.ops import OPS, add_norm, linear, lm_loss_forward_backward
from handgrad.ops.act import Act
from handgrad.testing import check_op, gradcheck, set_scalars

NAMES = ("linear", "linear_backward_w", "linear_backward_x", "linear_act", "linear_act_backward")


@pytest.mark.parametrize("name", NAMES)
def test_linear(name):
    check_op(OPS[name], [open_backend("cpu")])


def error_with_readers(readers, act=Act.GELU_TANH):
    """The largest gradient error of x -> linear with act -> one linear per reader -> loss. A reader "pre" gets the
    pre-activation and returns its gradient; a reader "y" returns the gradient of the activation's output."""
    N, K, H, M, V = 6, 5, 7, 9, 11

    def record(g):
        def weight(name, *shape):
            return g.param(name, shape, normal(1.0))

        def layer(x, pre_x, name, size, **attrs):
            w, b = weight("w" + name, size, x.shape[1]), weight("b" + name, size)
            return g.emit(linear, x, w, b, pre_x, **attrs)

        h, pre = layer(g.input("x", (N, K), F32), None, "in", H, act=act, keep_pre=True)
        outs = [
            layer(h, pre if reader == "pre" else None, f"{i}", M, act=Act.NONE, keep_pre=False)[0]
            for i, reader in enumerate(readers)
        ]
        y = outs[0] if len(outs) == 1 else g.emit(add_norm, *outs, weight("w", M), weight("b", M), None, eps=1e-5)[1]
        head, targets = weight("head", V, M), g.input("targets", (N,), I32)
        attrs = dict(V=V, chunks=1, scale=1.0, softcap=0.0)
        losses, *_ = g.emit(lm_loss_forward_backward, y, head, targets, None, None, into={"dw": g.grad(head)}, **attrs)
        g.output("losses", losses)

    def fill(p, arena):
        rng = np.random.default_rng(0)
        for info in p.params.values():
            arena.view(info.tensor)[...] = rng.standard_normal(info.tensor.shape)
        arena.view(p.inputs["x"])[...] = rng.standard_normal((N, K))
        arena.view(p.inputs["targets"])[...] = rng.integers(0, V, N)
        set_scalars(p, arena)

    return gradcheck(record, fill)


@pytest.mark.parametrize("readers", [("pre",), ("y",), ("pre", "y"), ("pre", "pre"), ("y", "y")], ids="+".join)
def test_gradient_of_activation_and_of_pre_activation(readers):
    assert error_with_readers(readers) < 1e-6


@pytest.mark.parametrize("act", [act for act in Act if act is not Act.NONE])
def test_second_linear_applies_the_derivative_of_the_first_ones_activation(act):
    assert error_with_readers(("pre",), act) < 1e-6


@pytest.mark.parametrize(("lost", "readers"), [("pre", ("pre",)), ("dx0", ("y", "y")), ("dx0", ("pre", "y"))])
def test_missing_input_of_the_gradient_is_caught(lost, readers, monkeypatch):
    kind = type(OPS["linear_backward_x"])
    right = kind.ref
    monkeypatch.setattr(kind, "ref", lambda self, v: right(self, type(v)(**{**vars(v), lost: None})))
    assert error_with_readers(readers) > 1e-2
