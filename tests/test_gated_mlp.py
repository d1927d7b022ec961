"""gated_mlp of models/blocks.py: its parameters, its gradients, and what the policy "act" recomputes."""

import numpy as np
import pytest

from handgrad.core.backward import POLICIES, backward
from handgrad.core.dtypes import F32, I32
from handgrad.core.params import normal
from handgrad.core.program import Program
from handgrad.models.blocks import gated_mlp, layer_norm, lm_head_loss
from handgrad.ops import add
from handgrad.ops.act import Act
from handgrad.testing import gradcheck, set_scalars

N, C, SIZE, V = 6, 5, 7, 11


def record(g, act=Act.SILU):
    x = g.input("x", (N, C), F32)
    with g.block("h.0"):
        h = gated_mlp(g, x, "mlp", size=SIZE, act=act, p=0.0, std=0.02)
    with g.block("head", prefix=False):
        y = layer_norm(g, x, h, "ln_f")[1]
        lm_head_loss(g, y, g.param("head", (V, C), normal(1.0)), g.input("t", (N,), I32), vocab_size=V, chunks=1)


def fill(p, arena):
    rng = np.random.default_rng(0)
    for info in p.params.values():
        arena.view(info.tensor)[...] = rng.standard_normal(info.tensor.shape)
    arena.view(p.inputs["x"])[...] = rng.standard_normal((N, C))
    arena.view(p.inputs["t"])[...] = rng.integers(0, V, N)
    set_scalars(p, arena)


def test_gated_mlp_packs_gate_and_up_and_has_no_biases():
    p = Program(F32, trains=True)
    record(p)
    shapes = {name: info.tensor.shape for name, info in p.params.items() if name.startswith("h.0")}
    assert shapes == {"h.0.mlp.gate_up.weight": (2 * SIZE, C), "h.0.mlp.down.weight": (C, SIZE)}


@pytest.mark.parametrize("act", [Act.SILU, Act.GELU_TANH, Act.GELU_ERF])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_gated_mlp_are_finite_differences(act, policy):
    assert gradcheck(lambda g: record(g, act), fill, POLICIES[policy]) < 1e-6


@pytest.mark.parametrize("policy, again", [("none", []), ("act", ["gated"]), ("block", ["linear", "gated"])])
def test_policy_act_recomputes_the_gate_alone(policy, again):
    p = Program(F32, trains=True)
    record(p)
    backward(p, add, drop=POLICIES[policy])
    assert [c.op.name for c in p.calls if c.phase == "recompute" and c.block == "h.0"] == again
