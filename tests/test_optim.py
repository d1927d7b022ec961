"""Schedules at every step; settings that would make NaN; AdamW and clipping against PyTorch."""

import json
import math
from dataclasses import asdict, replace
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core.dtypes import DTYPES
from handgrad.core.errors import HandgradError
from handgrad.core.params import ONES, normal
from handgrad.core.program import Program
from handgrad.data import tokens
from handgrad.ops.adamw.reference import join_weight, split_weight
from handgrad.optim import OPTIMIZERS, AdamW, record_step, schedules
from handgrad.train.config import Config, OptimConfig, OptimizerName, from_names
from handgrad.train.execution import Execution
from handgrad.train.optimizers import optimizer_of, optimizer_settings
from handgrad.train.outliers import Guard
from handgrad.train.schedule import schedule_of
from handgrad.train.start import Start
from handgrad.train.trainer import Trainer

LLMC = ("cosine", "linear", "constant", "wsd")


def closed_form(kind, peak, warmup, steps, final):
    """The learning rates of all steps of a run, from the formulas of llm.c's schedulers with its count from 0."""
    rates = []
    for t in range(steps):
        left = peak - peak * final
        if t < warmup:
            rates.append(peak * (t + 1) / warmup)
        elif kind == "constant":
            rates.append(peak)
        elif kind == "wsd":
            begin = 8 * steps // 10
            rates.append(peak if t < begin else peak * final + left * (1 - math.sqrt((t - begin) / (steps - begin))))
        else:
            done = (t - warmup) / (steps - warmup)
            rates.append(peak * final + left * ((1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done))
    return rates


LENGTHS = [(0, 1), (1, 1), (0, 2), (0, 3), (2, 3), (3, 3), (1, 10), (8, 10), (10, 10), (10, 60), (7, 61), (20, 100)]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warmup", "steps"), LENGTHS)
@pytest.mark.parametrize("kind", LLMC)
def test_schedules_equal_llmcs_at_every_step(kind, warmup, steps, final):
    if kind == "constant" and final != 1.0 or kind == "wsd" and warmup > 8 * steps // 10:
        return  # refused: below
    lr = schedules.schedule(kind, 2.0, warmup, steps, final)
    rates = [lr(step) for step in range(1, steps + 1)]
    assert rates == pytest.approx(closed_form(kind, 2.0, warmup, steps, final), rel=1e-12)
    assert min(rates) > 0 and max(rates) == 2.0  # every step learns, and one has the peak
    assert [lr(np.int64(step)) for step in range(steps, 0, -1)] == rates[::-1]  # functions of the step alone
    if warmup < steps and kind != "constant":
        assert lr(steps + 1) == lr(10**9) == pytest.approx(2.0 * final, abs=1e-12)


def others_form(kind, t, warmup, steps, final, s):
    """The factor of the peak at step t, counted from 0: the formulas of transformers' schedulers and torch's StepLR,
    with `final` as transformers' lr_end and min_lr_ratio, and as a floor where they have neither."""
    past, left = t - warmup, steps - warmup
    if t < warmup:
        return (t + 1) / warmup
    if kind == "wsd":  # as get_wsd_schedule, 1-sqrt added
        begin = steps - s["cooldown"] if s["cooldown"] >= 1 else round(steps * (1 - s["cooldown"]), 6) // 1
        if t < begin:
            return 1.0
        r = (t - begin) / (steps - begin)
        down = {"linear": 1 - r, "cosine": 0.5 + math.cos(math.pi * r) / 2, "sqrt": 1 - r**0.5}[s["cooldown_shape"]]
        return down * (1 - final) + final
    if kind == "polynomial":
        return (1 - final) * (1 - past / left) ** s["power"] + final
    if kind == "cosine_with_restarts":  # in fractions: the first step of a cycle has the peak
        turn = Fraction(past, left) * s["cycles"] % 1
        return final + (1 - final) * (1 + math.cos(math.pi * float(turn))) / 2
    if kind == "inverse_sqrt":
        scale = warmup or 10_000
        return max(1 / math.sqrt((t + scale - warmup) / scale), final)
    every = s["decay_every"] if s["decay_every"] >= 1 else math.ceil(round(s["decay_every"] * steps, 6))
    return max(s["decay_factor"] ** (past // every), final)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("wsd", dict(cooldown=0.5, cooldown_shape="linear")),
        ("wsd", dict(cooldown=1, cooldown_shape="cosine")),
        ("wsd", dict(cooldown=0.3, cooldown_shape="sqrt")),
        ("polynomial", dict(power=2.0)),
        ("polynomial", dict(power=0.5)),
        ("cosine_with_restarts", dict(cycles=3)),
        ("inverse_sqrt", {}),
        ("step", dict(decay_every=0.25, decay_factor=0.1)),
        ("step", dict(decay_every=3, decay_factor=0.5)),
    ],
)
def test_schedules_equal_transformers_and_torchs_at_every_step(kind, settings, steps):
    for warmup in sorted({0, steps // 2, min(1, steps // 2)}):
        for final in (0.0, 0.1):
            if kind == "wsd" and warmup > schedules.cooldown_begin(steps, settings["cooldown"]):
                continue  # refused: below
            lr = schedules.schedule(kind, 2.0, warmup, steps, final, **settings)
            rates = [lr(step) for step in range(1, steps + 1)]
            expected = [2.0 * others_form(kind, t, warmup, steps, final, settings) for t in range(steps)]
            assert rates == pytest.approx(expected, rel=1e-12)
            assert min(rates) > 0 and max(rates) == 2.0


def test_a_setting_of_0_is_not_replaced_by_the_default():
    given = {"schedule": "wsd", "warmup": 0, "steps": 10, "lr": 1.0}
    rates = [schedule_of(from_names(given | {"cooldown": cooldown}))(10) for cooldown in (0, None)]
    assert rates[0] == 1.0 > rates[1]
    with pytest.raises(HandgradError, match=r"cycles is a number from 1 on, but got 0"):
        schedule_of(from_names(given | {"schedule": "cosine_with_restarts", "cycles": 0}))


def test_lengths_are_steps_or_fractions():
    for whole, fraction in ((100, 0.1), (1, 0.0005), (700, 0.7)):  # rounded up, and not by a last bit
        for kind in ("cosine", "constant", "inverse_sqrt", "step"):
            a, b = (schedules.schedule(kind, 1.0, warmup, 1000) for warmup in (whole, fraction))
            assert [a(t) for t in (1, 2, 100, 701, 1000)] == [b(t) for t in (1, 2, 100, 701, 1000)]
    assert (
        schedules.cooldown_begin(10, 0.3) == schedules.cooldown_begin(10, 3) == schedules.cooldown_begin(10, 3.0) == 7
    )
    with pytest.raises(HandgradError, match=r"\[schedule\] power is a setting of polynomial, but got schedule cosine"):
        schedules.schedule("cosine", 1.0, 0, 10, power=2.0)
    with pytest.raises(HandgradError, match=r"cooldown lies between 0 and the 10 steps of the run, but got 11"):
        schedules.wsd(1.0, 0, 10, cooldown=11)


def test_momentum_rises_and_falls():
    """0.85 to 0.95 over 300 steps, as (1 - f) 0.85 + f 0.95 with f = t / 300, t counted from 0; back over 50."""
    at = schedules.momentum(300, 1000, 50)
    rising = [(1 - min(t / 300, 1)) * 0.85 + min(t / 300, 1) * 0.95 for t in range(950)]
    falling = [0.85 + 0.1 * (999 - t) / 50 for t in range(950, 1000)]
    assert [at(step) for step in range(1, 1001)] == pytest.approx(rising + falling, rel=1e-12)
    assert schedules.momentum(0, 10)(1) == schedules.momentum(0, 10)(10) == 0.95
    with pytest.raises(HandgradError, match="momentum rises and falls within the 300 steps of the run"):
        schedules.momentum(300, 300, 1)
    with pytest.raises(
        HandgradError, match=r"\[schedule\] a momentum that rises from 0.85 is at least that, but got 0.5"
    ):
        schedules.momentum(2, 10, peak=0.5)


def test_schedules_at_known_points():
    """By hand: 60 steps from 0 to 1 are done, of which the cosine has done half at step 41 (20 + 40 / 2 done)."""
    assert schedules.cosine(1.0, 0, 100, 0.0)(26) == pytest.approx(0.5 + 0.5 * np.cos(np.pi / 4))
    assert schedules.cosine(1.0, 20, 60, 0.2)(41) == pytest.approx(0.6)
    assert [schedules.linear(1.0, 0, 4)(step) for step in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    assert schedules.linear(1.0, 0, 1)(1) == schedules.cosine(1.0, 0, 1, 0.0)(1) == schedules.wsd(1.0, 0, 1)(1) == 1.0
    assert schedules.constant(3e-4)(1) == schedules.constant(3e-4)(10**9) == 3e-4
    assert [schedules.constant(1.0, 4)(step) for step in (1, 4, 5)] == [0.25, 1.0, 1.0]
    wsd = schedules.wsd(1.0, 10, 100)
    assert (wsd(80), wsd(81), wsd(86), wsd(101)) == (1.0, 1.0, pytest.approx(0.5), 0.0)
    assert schedules.wsd(1.0, 0, 10, cooldown=0.3)(8) == 1.0 > schedules.wsd(1.0, 0, 10, cooldown=0.3)(9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cosin", 1.0, 0, 10), r"\[schedule\] the kind is one of cosine, linear, constant, wsd, .* but got 'cosin'"),
        (("cosine", 1.0, 11, 10), r"\[schedule\] warm-up lies between 0 and the 10 steps of the run, but got 11"),
        (("cosine", 1.0, -1, 10), r"\[schedule\] warm-up .* but got -1"),
        (("wsd", 1.0, 95, 100), r"warm-up of wsd ends before the cooldown, .* after step 80 of 100, but got 95 steps"),
        (("wsd", 1.0, 1, 1), r"after step 0 of 1, but got 1 steps"),
        (("cosine", math.nan, 0, 10), r"\[schedule\] peak is a number from 0 on, but got nan"),
        (("wsd", math.inf, 0, 10), r"\[schedule\] peak is a number from 0 on, but got inf"),
        (("linear", -1.0, 0, 10), r"\[schedule\] peak is a number from 0 on, but got -1.0"),
        (("linear", True, 0, 10), r"\[schedule\] peak is a number from 0 on, but got True"),
        (("linear", 10**400, 0, 10), r"\[schedule\] peak is a number from 0 on"),
        (
            ("constant", 1e39, 0, 10),
            r"\[schedule\] peak is a number from 0 on, at most 3.4e\+38 \(the largest float32\), but got 1e\+39",
        ),
        (("cosine", 1.0, 0, 10, -0.1), r"\[schedule\] final is a number from 0 on, but got -0.1"),
        (("cosine", 1.0, 0, 10, math.nan), r"\[schedule\] final is a number from 0 on, but got nan"),
        (("cosine", 10.0, 0, 10, 1e38), r"\[schedule\] final \* peak is a number, at most 3.4e\+38"),
        (("cosine", 1.0, 0, 0), r"\[schedule\] steps is a number from 1 on, but got 0"),
        (("cosine", 1.0, 0, 2**63), r"\[schedule\] steps is below 2\^63, but got an integer of 64 bits"),
        (("cosine", 1.0, 2.5, 10), r"\[schedule\] warmup is a whole number, but got 2.5"),
        (("cosine", 1.0, 0, "10"), r"\[schedule\] steps is a whole number, but got '10'"),
        (
            ("constant", 1.0, 0, 10, 0.5),
            r"\[schedule\] a constant schedule ends at its peak \(final 1.0\), but got 0.5",
        ),
    ],
)
def test_invalid_schedule_is_rejected(arguments, text):
    with pytest.raises(HandgradError, match=text):
        schedules.schedule(*arguments)


def test_schedule_refuses_step_zero():
    with pytest.raises(HandgradError, match=r"\[schedule\] step is a number from 1 on, but got 0"):
        schedules.linear(1.0, 0, 10)(0)


@pytest.mark.parametrize("name", ["eps", "weight_decay", "clip", "beta1", "beta2"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e39, 10**400, True, "1", None])
def test_hyperparameters_that_would_make_nan_are_rejected(name, value):
    changed = {"betas": (value, 0.9) if name == "beta1" else (0.9, value)} if "beta" in name else {name: value}
    with pytest.raises(HandgradError, match=r"\[optim\]"):
        AdamW(**changed)
    if value != -1.0 and (name, value) != ("weight_decay", None):  # left to AdamW
        with pytest.raises(HandgradError, match=rf"\[optim\] --{name.replace('_', '-')} is a number"):
            OptimConfig(**{name: value})


@pytest.mark.parametrize(
    "bad", [dict(betas=(0.9, 1.0)), dict(betas=(0.9,)), dict(betas=0.9), dict(eps=0), dict(eps=1e-60)]
)
def test_hyperparameters_out_of_range_are_rejected(bad):
    """eps 0: a parameter that never had a gradient, such as a padded row of the embedding, would become 0 / 0."""
    with pytest.raises(HandgradError, match=r"\[optim\]"):
        AdamW(**bad)


def test_numbers_of_numpy_are_numbers():
    optim = AdamW((np.float32(0.5), 0), np.float64(1e-6), np.float32(0.25), np.int64(2))
    assert optim == AdamW((0.5, 0.0), 1e-6, 0.25, 2.0)
    assert {type(v) for v in (*optim.betas, optim.eps, optim.weight_decay, optim.clip)} == {float}
    assert schedules.cosine(np.float32(0.5), np.int32(2), np.int64(8))(np.int8(2)) == 0.5
    assert type(from_names(dict(steps=np.int64(3), skip_loss_z=np.float32(2))).run.steps) is int
    assert json.dumps(asdict(Config(optim=OptimConfig(lr=np.float32(0.5), warmup=np.int16(2)))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True])
def test_guards_and_learning_rates_that_are_no_numbers_are_rejected(value, tiny, shards):
    for name in ("loss_z", "grad_z"):
        with pytest.raises(HandgradError, match=rf"\[train\] {name} is a number"):
            Guard(**{name: value})
        with pytest.raises(HandgradError, match=rf"\[optim\] --skip-{name.replace('_', '-')} is a number"):
            OptimConfig(**{f"skip_{name}": value})
    for name in ("lr", "final"):
        with pytest.raises(HandgradError, match=rf"\[optim\] --{name} is a number"):
            OptimConfig(**{name: value})
    execution = Execution(3, extra_programs=(), backend="ref")
    run = Trainer(tiny(), AdamW(), tokens(shards, 20, 60), execution=execution)
    before = {name: w.copy() for name, w in run.params().items()}
    with pytest.raises(HandgradError, match=r"\[train\] lr is a number"):
        run.step(1, value)
    assert run.last_step == 0 and all(np.array_equal(w, before[name]) for name, w in run.params().items())


@pytest.mark.parametrize("value", [2**63, 10**30, True, 1.5, "3", -1])
def test_counts_that_are_no_counts_are_rejected(value):
    for make in (lambda: Execution(value), lambda: Execution(1, head_bytes=value), lambda: Start(value)):
        with pytest.raises(HandgradError, match="is a whole number|below 2|a number from|at least 1|not negative"):
            make()
    for name in ("steps", "micro_batch", "threads", "seed", "val_every"):
        with pytest.raises(HandgradError, match=rf"\[\w+\] --{name.replace('_', '-')} is "):
            from_names({name: value})


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
    torch = pytest.importorskip("torch")
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


def test_settings_name_an_optimizer_and_stand_for_it():
    """`--optimizer` and its own settings make the optimizer; a Trainer's journal records the same settings."""
    settings = OptimConfig(beta1=0.8, beta2=0.97, eps=1e-7, weight_decay=0.2, clip=0.5)
    optim = optimizer_of(settings)
    assert optim == AdamW((0.8, 0.97), 1e-7, 0.2, 0.5)
    assert optimizer_of(replace(OptimConfig(), **optimizer_settings(optim))) == optim
    assert get_args(OptimizerName) == tuple(OPTIMIZERS)
