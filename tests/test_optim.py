"""Schedules at their corner points; AdamW and clipping against PyTorch."""

import numpy as np
import pytest
import torch

from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.params import ONES, normal
from handgrad.core.program import Program
from handgrad.ops.adamw.reference import join_weight, split_weight
from handgrad.optim import AdamW, record_step, schedules


@pytest.mark.parametrize(
    ("kind", "final", "last"), [("cosine", 0.1, 0.1), ("linear", 0.0, 0.0), ("constant", None, 1.0), ("wsd", 0.0, 0.0)]
)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_warmup_peak_and_end(kind, final, last, warmup):
    lr = schedules.schedule(kind, 2.0, warmup, 100, final)
    assert [lr(step) for step in range(1, warmup + 1)] == [2.0 * step / warmup for step in range(1, warmup + 1)]
    after = [lr(step) for step in range(max(warmup, 1), 101)]
    assert after == sorted(after, reverse=True) and max(after) <= 2.0
    assert lr(100) == pytest.approx(2.0 * last, abs=1e-12) and lr(150) == pytest.approx(2.0 * last, abs=1e-12)


def test_schedules_at_known_points():
    assert schedules.cosine(1.0, 0, 100, 0.0)(25) == pytest.approx(0.5 + 0.5 * np.cos(np.pi / 4))
    assert schedules.linear(1.0, 20, 100, 0.2)(60) == pytest.approx(0.6)
    assert schedules.constant(3e-4)(1) == schedules.constant(3e-4)(10**9) == 3e-4
    wsd = schedules.wsd(1.0, 10, 100)
    assert wsd(80) == 1.0 and wsd(85) == pytest.approx(0.5) and wsd(100) == 0.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cosin", 1.0, 0, 10), r"\[schedule\] the kind is one of cosine, linear, constant, wsd, but got 'cosin'"),
        (("cosine", 1.0, 11, 10), r"\[schedule\] warm-up lies between 0 and the 10 steps of the run, but got 11"),
        (("cosine", 1.0, -1, 10), r"\[schedule\] warm-up .* but got -1"),
        (
            ("constant", 1.0, 0, 10, 0.5),
            r"\[schedule\] a constant schedule ends at its peak \(final 1.0\), but got 0.5",
        ),
    ],
)
def test_invalid_schedule_is_rejected(arguments, text):
    with pytest.raises(HandgradError, match=text):
        schedules.schedule(*arguments)


@pytest.mark.parametrize(
    "bad",
    [dict(betas=(0.9, 1.0)), dict(betas=(-0.1, 0.9)), dict(eps=-1.0), dict(weight_decay=float("nan")), dict(clip=-1.0)],
)
def test_hyperparameters_out_of_range_are_rejected(bad):
    with pytest.raises(HandgradError, match=r"\[optim\]"):
        AdamW(**bad)


SHAPES = {"w": (37, 130), "norm": (301,)}  # a matrix, with weight decay, and a vector, without


def ours(optim, starts, grads, dtype, backend):
    """Weights after one update for each of `grads`, and the gradient norms that were measured."""
    p = Program(DTYPES[dtype], trains=True)
    for name, shape in SHAPES.items():
        p.grad(p.param(name, shape, ONES if len(shape) == 1 else normal(1.0)))
    record_step(p, optim)
    backend = open_backend(backend)
    arena = backend.alloc(backend.plan(p))
    for name, w in starts.items():
        if dtype == "f32":
            arena.part("param", p.params[name].tensor)[...] = w
        else:
            halves = split_weight(w)
            for flat, half in zip(("param", "low"), halves):
                arena.part(flat, p.params[name].tensor)[...] = half
    scalars, run, norms = arena.scalars(p), backend.bind(p, arena), []
    for scalars.step, step in enumerate(grads, 1):
        scalars.lr = 1e-2 / scalars.step
        for name, g in step.items():
            arena.part("grad", p.params[name].tensor)[...] = g
        run.run(p.segments.norm_update)
        norms.append(float(scalars.grad_norm))
    working = {name: np.array(arena.part("param", info.tensor), np.float32) for name, info in p.params.items()}
    if dtype == "f32":
        return working, norms
    return {name: join_weight(w, arena.part("low", p.params[name].tensor)) for name, w in working.items()}, norms


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "f32"), ("cpu", "bf16"), ("ref", "f32")])
def test_adamw_matches_pytorch_over_ten_steps(clip, backend, dtype):
    rng = np.random.default_rng(0)
    starts = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    grads = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(10)]
    weights, norms = ours(
        AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=clip), starts, grads, dtype, backend
    )

    torch_params = {name: torch.nn.Parameter(torch.tensor(w, dtype=torch.float64)) for name, w in starts.items()}
    judge = torch.optim.AdamW(
        [{"params": [torch_params["w"]], "weight_decay": 0.1}, {"params": [torch_params["norm"]], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for i, step in enumerate(grads, 1):
        for name, g in step.items():
            torch_params[name].grad = torch.tensor(g, dtype=torch.float64)
        norm = torch.nn.utils.clip_grad_norm_(torch_params.values(), clip or float("inf"))
        assert norms[i - 1] == pytest.approx(float(norm), rel=1e-6)
        for group in judge.param_groups:
            group["lr"] = 1e-2 / i
        judge.step()
    for name, w in torch_params.items():
        np.testing.assert_allclose(weights[name], w.detach().numpy(), rtol=2e-6, atol=2e-6)  # for bf16, too
