"""SGD, Lion, Adafactor and AdamW's variants: against PyTorch and others' code, in memory, after a resume, on ranks."""

import json
import math
from functools import lru_cache

import numpy as np
import pytest
from rank_threads import on_ranks

import handgrad as hg
from handgrad.backends.cpu import CpuBackend
from handgrad.backends.ranks.comm import Planned
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.core.errors import HandgradError
from handgrad.data import id_dtype, write_shard
from handgrad.models import GPT2, Llama
from handgrad.ops.adamw.reference import join_weight
from handgrad.optim import OPTIMIZERS, SGD, Adafactor, AdamW, Lion, Muon, ScheduleFree
from handgrad.train.config import Config, OptimConfig
from handgrad.train.explain import explain
from handgrad.train.optimizers import optimizer_of
from handgrad.train.schedule import momentum_of

WIDTH, VOCAB, STEPS = 24, 97, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of ids below 97 with much repetition."""
    out = tmp_path_factory.mktemp("optimizers")
    ids = np.cumsum(np.random.default_rng(0).integers(0, 3, 5000)) % VOCAB
    write_shard(out / "train_0.bin", [ids], id_dtype(VOCAB))
    meta = {"tokenizer": {"kind": "chars", "characters": "".join(map(chr, range(33, 130)))}, "vocab_size": VOCAB}
    (out / "meta.json").write_text(json.dumps(meta | {"dtype": "uint16", "train": {}, "val": {}}))
    return str(out)


def trainer(folder, optim, dtype="f32", master=True, *, layers=1, zero=1, backend=None, out=None):
    """Two micro-batches of two sequences on one rank, one on each of two ranks."""
    execution = hg.Execution(2, extra_programs=(), zero=zero, backend="cpu", threads=1)
    precision = hg.Precision(dtype, master_weights=master)
    model, data = GPT2(VOCAB, 8, layers, 2, WIDTH), hg.data.tokens(folder, 8, 32)
    kind = dict(execution=execution, precision=precision, backend=backend, start=hg.Start(3), out=out)
    return hg.Trainer(model, optim, data, **kind)


def real(name, array):
    """The rows of a parameter that are no padding."""
    return np.asarray(array)[:VOCAB] if name == "wte.weight" else np.asarray(array)


def weights(run):
    """The weights, float32, without padding; in bf16 with their low halves."""
    held, low = run.params(), run._state()
    found = {name: np.array(w, np.float32) for name, w in held.items()}
    joined = {name: join_weight(w, low[f"low.{name}"]) if f"low.{name}" in low else w for name, w in found.items()}
    return {name: real(name, w) for name, w in joined.items()}


def matrices(run, found):
    """The same with q, k and v apart, each of which has a factor and means of its own."""
    apart = {}
    for name, array in found.items():
        rows = [rows for rows, _ in run.program.params[name].parts][:-1]
        apart |= (
            {f"{name}.{k}": part for k, part in enumerate(np.split(array, np.cumsum(rows)))} if rows else {name: array}
        )
    return apart


def both(folder, optim, make_judge, lr, dtype="f32", master=True, momentum=None):
    """(ours, the judge's, the start) after 50 steps; momentum: of a step, if it is scheduled. The judge has weights of its own, in float64, and the gradients
    of our steps: of a whole GPT-2, with tied weights and padding."""
    torch = pytest.importorskip("torch")
    run = trainer(folder, optim, dtype, master)
    apart = lambda found: matrices(run, found)  # noqa: E731
    start = apart(weights(run))
    theirs = {name: torch.nn.Parameter(torch.tensor(w, dtype=torch.float64)) for name, w in start.items()}
    judge = make_judge(torch, [{"params": [w], "weight_decay": 0.1 if w.ndim > 1 else 0.0} for w in theirs.values()])
    for step in range(1, STEPS + 1):
        result = run.step(step, lr, momentum(step) if momentum else None)
        assert math.isfinite(result.loss)
        grads = apart({name: real(name, grad) for name, grad in run.grads().items()})
        for name, w in theirs.items():
            w.grad = torch.tensor(np.array(grads[name], np.float64))
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), optim.clip)
        for group in judge.param_groups:
            group |= {"lr": lr} | ({"momentum": momentum(step)} if momentum else {})
        judge.step()
    return apart(weights(run)), {name: w.detach().numpy() for name, w in theirs.items()}, start


def sgd(torch, groups, **kind):
    return torch.optim.SGD(groups, **kind)


def scaled_adamw(torch, groups):
    """nanoT5's AdamW: the step of a tensor times its RMS, and decay that does not feel it."""

    class Scaled(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    s = self.state.setdefault(p, {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)})
                    s["t"] += 1
                    s["m"] = 0.9 * s["m"] + 0.1 * p.grad
                    s["v"] = 0.95 * s["v"] + 0.05 * p.grad**2
                    root = (s["v"] / (1 - 0.95 ** s["t"])).sqrt() + 1e-8
                    size = max(1e-3, float(p.detach().norm()) / p.numel() ** 0.5)
                    change = group["lr"] * size * s["m"] / (1 - 0.9 ** s["t"]) / root
                    p.data = p.data - group["lr"] * group["weight_decay"] * p.data - change

    return Scaled(groups, {"lr": 0.0})


def t5s(torch, groups, **kind):
    """Adafactor of transformers; it multiplies the decay by the parameter's RMS, so there is none here."""
    Adafactor = pytest.importorskip("transformers.optimization").Adafactor
    return Adafactor([g["params"][0] for g in groups], lr=0.0, relative_step=False, warmup_init=False, **kind)


CASES = {
    "sgd": (SGD(momentum=0.0, weight_decay=0.1), lambda t, g: sgd(t, g), 0.5),
    "sgd momentum": (SGD(0.9, weight_decay=0.1), lambda t, g: sgd(t, g, momentum=0.9), 0.1),
    "sgd nesterov": (
        SGD(0.9, True, weight_decay=0.1, clip=0.0),
        lambda t, g: sgd(t, g, momentum=0.9, nesterov=True),
        0.1,
    ),
    "sgd scheduled": (
        SGD(0.9, weight_decay=0.1),
        lambda t, g: sgd(t, g, momentum=0.9),
        0.1,
        hg.optim.schedules.momentum(20, STEPS, 10, peak=0.9),
    ),
    "adamw scaled": (AdamW(scale_parameter=True), scaled_adamw, 0.1),
    "adafactor": (
        Adafactor(weight_decay=0.1),
        lambda t, g: t.optim.Adafactor(g, eps=(1e-30, 1e-3)),
        0.02,
    ),
    "adafactor relative": (  # 1 / sqrt(t) is below 0.2 from step 26 on
        Adafactor(relative_step=True, weight_decay=0.1),
        lambda t, g: t.optim.Adafactor(g, eps=(1e-30, 1e-3)),
        0.2,
    ),
    "adafactor of t5": (Adafactor(clip=1.0), lambda t, g: t5s(t, g), 0.02),
    "adafactor unscaled": (Adafactor(scale_parameter=False), lambda t, g: t5s(t, g, scale_parameter=False), 1e-3),
}


@pytest.mark.parametrize("name, dtype", [(name, "f32") for name in CASES] + [("sgd", "bf16"), ("adafactor", "bf16")])
def test_fifty_steps_match_another_implementation(folder, name, dtype):
    """Tolerance: a step rounds the weight, to 2^-24 of it, and its own size by 2^-22 of it: a quotient of roots and
    means. The 50 steps together are as large as the change if they go one way, and as the largest weight if they scale
    with it. Errors add up to 50 (2^-24 |w| + 2^-22 (change + |w|)) at most."""
    optim, make_judge, lr, *momentum = CASES[name]
    got, wanted, start = both(folder, optim, make_judge, lr, dtype, True, *momentum)
    for key, w in wanted.items():
        change = np.abs(w - start[key]).max()
        assert change > 1e-5, key  # it learned
        top = max(np.abs(w).max(), np.abs(start[key]).max())
        bound = STEPS * (2**-24 * top + 2**-22 * (change + top))
        assert np.abs(got[key] - w).max() <= bound, key


def test_lion_matches_another_implementation(folder):
    """Where the interpolation is as small as its rounding the sign may differ: of 10^-3 of the weights at most."""
    package = pytest.importorskip("pytorch_optimizer")
    optim, lr = Lion((0.9, 0.99), weight_decay=0.1), 1e-2
    got, wanted, start = both(
        folder, optim, lambda t, g: package.Lion(g, lr=lr, betas=(0.9, 0.99), weight_decouple=True), lr
    )
    off = total = 0
    for key, w in wanted.items():
        assert np.abs(w - start[key]).max() > lr
        off += np.sum(np.abs(got[key] - w) > STEPS * 2**-23 * (np.abs(w).max() + lr))
        total += w.size
    assert off <= 1e-3 * total


@pytest.mark.parametrize(
    "optim, lr",
    [(SGD(clip=0.0), 0.1), (Lion(), 1e-2), (Adafactor(), 0.02), (ScheduleFree(), 1e-2)],
    ids=lambda o: str(o)[:9],
)
def test_weights_without_low_halves_keep_small_steps(folder, optim, lr):
    """Every rounding moves a weight by less than a bf16 ulp, 2^-7 of it, up or down with mean 0: after 50 steps the mean
    distance from the same run with low halves is below a walk's, sqrt(50) ulp / 2."""
    with_low, without = (trainer(folder, optim, "bf16", master) for master in (True, False))
    assert not any(name.startswith("low") for name in without._state())
    for step in range(1, STEPS + 1):
        for run in (with_low, without):
            run.step(step, lr / step)
    a, b = weights(with_low)["wpe.weight"], weights(without)["wpe.weight"]
    ulp = 2.0**-7 * np.abs(a).max()
    assert 0 < np.abs(a - b).mean() < np.sqrt(STEPS) * ulp / 2


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_small_moments_train_as_large_ones_do(folder, moments):
    """The same losses within what they vary over the last steps: moments are off by 2^-9 (bf16) or 2^-7 of themselves
    at random, and a step by as much, so that a loss is off by a small part of what it has fallen."""
    losses = {}
    for kind in ("f32", moments):
        run = trainer(folder, AdamW(moments=kind), layers=2)
        losses[kind] = [run.step(step, 1e-2).loss for step in range(1, 41)]
    fallen = losses["f32"][0] - np.mean(losses["f32"][-8:])
    assert fallen > 1.0
    assert abs(np.mean(losses["f32"][-8:]) - np.mean(losses[moments][-8:])) < 0.02 * fallen
    assert losses["f32"] != losses[moments]


def state_bytes(run, optim, dtype):
    """What the state of an optimizer takes, from its definition: every vector and state at a multiple of 256 bytes."""
    n, aligned = run.program.flat_size, lambda size: -(-size // 256) * 256
    low = [2 * n] if dtype == "bf16" else []
    if isinstance(optim, Adafactor):
        params = [(info.tensor.shape, [rows for rows, _ in info.parts]) for info in run.program.params.values()]
        shapes = [(n, *shape[1:]) for shape, rows in params for n in rows or shape[:1]]
        vectors = low + [4 * m for s in shapes for m in (s if len(s) == 2 else (1, *s))]
    elif isinstance(optim, AdamW):
        each = {"f32": [4 * n], "bf16": [2 * n], "int8": [n, 4 * n // 128]}[optim.moments]
        vectors = 2 * each + low
    elif isinstance(optim, ScheduleFree):
        vectors = [*low, 4 * n, 4 * n, 8]  # z, v, and the count of steps
    else:
        vectors = low + [4 * n] * (getattr(optim, "momentum", 1) > 0)
    return sum(map(aligned, vectors))


ALL = [AdamW(moments=m) for m in ("f32", "bf16", "int8")]
ALL += [AdamW(scale_parameter=True), SGD(), SGD(0.0), Lion(), Adafactor(), ScheduleFree()]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("optim", ALL, ids=str)
def test_memory_is_what_explain_says(folder, optim, dtype, tmp_path):
    run = trainer(folder, optim, dtype, out=tmp_path)
    page = explain(
        run.model, 8, execution=run.execution, precision=run.precision, backend=run.backend, optim=optim, accumulation=2
    )
    assert page.plan.nbytes == run.plan.nbytes == run.arena.bytes.nbytes
    assert run.plan.region["state"][1] == state_bytes(run, optim, dtype)
    held = {**run.params(), **run._state()}
    assert page.checkpoint_bytes == sum(a.nbytes for a in held.values())


@pytest.mark.parametrize("optimizer", [["adamw", "--moments", "int8"], ["adafactor"], ["schedule_free"]], ids=" ".join)
def test_resume_is_bit_exact(folder, optimizer, tmp_path):
    """A run of six steps, and one of three that goes on: the same bytes of weights and state."""
    command = ["train", "--train", folder, "--preset", "tiny", "--num-layers", "1", "--hidden-size", str(WIDTH)]
    command += ["--num-heads", "2", "--max-seq-len", "8", "--micro-batch", "2", "--backend", "cpu", "--dtype", "bf16"]
    command += ["--warmup", "0", "--schedule", "constant", "--threads", "1", "--sample-tokens", "0", "--val-every", "0"]
    command += ["--optimizer", *optimizer]
    assert main([*command, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    assert main([*command, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert main([*command, "--steps", "6", "--out", str(tmp_path / "parts"), "--resume", "auto"]) == 0
    for name in ("model.safetensors", "state.rank00.safetensors"):
        whole, parts = ((tmp_path / run / "step_000006" / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts and len(whole) > 1000
    assert (tmp_path / "parts" / "step_000003" / name).read_bytes() != whole  # three steps changed it


WHOLE = [Adafactor(weight_decay=0.1), AdamW(scale_parameter=True)]  # their steps need whole parameters
SEQUENCES, FEW = 12, 3
# no key bias: the rounding in its gradient would reach all of a packed bias by the size of the step; and every bucket
# but the last one has a multiple of 4 x 128 elements: the flat order of 2 and 4 ranks, and its random bits, are those of 1
LLAMA = Llama(VOCAB, 8, 2, 4, 2, WIDTH, mlp_size=32, qk_norm=True)


def on_rank(folder, optim, zero, backend, dtype="f32", out=None):
    """The trainer of a rank."""
    execution = hg.Execution(SEQUENCES // backend.comm.world, extra_programs=(), zero=zero, backend="cpu", threads=1)
    kind = dict(execution=execution, precision=hg.Precision(dtype), backend=backend, start=hg.Start(3), out=out)
    return hg.Trainer(LLAMA, optim, hg.data.tokens(folder, 8, 8 * SEQUENCES), **kind)


def losses_and_arrays(run, first=1, last=FEW):
    """(losses; weights and state, whole, on rank 0) of steps."""
    losses = [run.step(step, 1e-2).loss for step in range(first, last + 1)]
    params, state = run.params(), run._state()
    return losses, {name: np.array(a) for name, a in (params | state).items()}


def assert_as_one(found, alone, atol):
    assert all(losses == found[0][0] for losses, _ in found)  # the same bits on all ranks
    np.testing.assert_allclose(found[0][0], alone[0], rtol=0, atol=atol)
    assert found[0][1].keys() == alone[1].keys()
    for name, value in alone[1].items():
        np.testing.assert_allclose(found[0][1][name], value, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def one_rank(folder):
    """`losses_and_arrays` of one rank in float64, by optimizer."""

    @lru_cache
    def train(optim):
        return on_ranks(1, lambda comm: losses_and_arrays(on_rank(folder, optim, 0, RefBackend(comm=comm))))[0]

    return train


SHARED = [AdamW(moments="bf16"), AdamW(moments="int8"), SGD(nesterov=True), Lion(), Muon(second_beta=0.9)]
ON_RANKS = [(optim, *kind) for optim in SHARED for kind in ((2, 2), (4, 3))]
ON_RANKS += [(optim, *kind) for optim in WHOLE for kind in ((2, 0), (2, 1), (3, 2), (4, 3))]


@pytest.mark.parametrize(("optim", "world", "zero"), ON_RANKS, ids=lambda x: str(x)[:9])
def test_ranks_train_as_one(folder, one_rank, optim, world, zero):
    """float64: gradients differ by rounding, 2^-53 of sums of a few hundred products, which Muon's polynomials enlarge
    at most a thousandfold in a step. test_distributed.py has AdamW."""
    found = on_ranks(world, lambda comm: losses_and_arrays(on_rank(folder, optim, zero, RefBackend(comm=comm))))
    assert_as_one(found, one_rank(optim), 1e-10 if isinstance(optim, Muon) else 1e-12)


@pytest.mark.parametrize("optim", WHOLE, ids=lambda o: type(o).__name__)
def test_optimizers_of_whole_parameters_on_two_ranks_in_float32(folder, optim):
    """A step rounds a weight below 2 by 2^-24, on two ranks and on one. Gradients, sums in another order, are off by
    2^-21 of themselves, and so is a step: the learning rate, times the parameter's size, here about 1 at most, times
    the element's part of it, below 5 = sqrt(25), as 24 elements or more have an RMS of 1."""

    def work(comm):
        return losses_and_arrays(on_rank(folder, optim, 3 if comm.world > 1 else 0, CpuBackend(1, comm)))

    assert_as_one(on_ranks(2, work), on_ranks(1, work)[0], FEW * (2 * 2.0**-24 + 1e-2 * 5 * 2.0**-21))


@pytest.mark.parametrize("optim", WHOLE, ids=lambda o: type(o).__name__)
def test_resume_on_another_number_of_ranks(folder, optim, tmp_path):
    """3 ranks with zero 3, then 1, then 2 with zero 2, two steps each, are one run of 6 steps, in float64, which checkpoints of
    it keep."""
    found = None
    for k, (world, zero) in enumerate(((3, 3), (1, 0), (2, 2))):

        def work(comm, first=2 * k + 1, zero=zero):
            run = on_rank(folder, optim, zero, RefBackend(comm=comm), out=tmp_path / "run")
            assert run.resume() == first - 1
            result = losses_and_arrays(run, first, first + 1)
            run.save(first + 1)
            run.close()
            return result

        found = on_ranks(world, work)[0]
    whole = on_ranks(1, lambda comm: losses_and_arrays(on_rank(folder, optim, 0, RefBackend(comm=comm)), 1, 6))[0]
    for name, value in whole[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("optim", WHOLE, ids=lambda o: type(o).__name__)
def test_resumed_ranks_give_the_same_bits(folder, optim, tmp_path):
    """Of bf16 weights with their low halves, and the state; and the memory of a rank is what explain plans."""
    planner = CpuBackend(1)
    planner.comm = Planned(2)

    def work(comm, out, spans):
        for first, last in spans:
            run = on_rank(folder, optim, 3, CpuBackend(1, comm), "bf16", out)
            assert run.resume() == first - 1
            found = losses_and_arrays(run, first, last)
            run.save(last)
            run.close()
        plan = explain(
            run.model, 8, execution=run.execution, precision=run.precision, backend=planner, optim=optim
        ).plan
        assert plan.nbytes == run.arena.bytes.nbytes and plan.region == run.plan.region
        return found[1]

    whole = on_ranks(2, lambda comm: work(comm, tmp_path / "a", [(1, 4)]))[0]
    parts = on_ranks(2, lambda comm: work(comm, tmp_path / "b", [(1, 2), (3, 4)]))[0]
    assert whole.keys() == parts.keys() and len(whole) > 30
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)


@pytest.mark.parametrize("optim", ALL, ids=str)
def test_gradients_that_are_not_finite_change_no_bit(folder, optim):
    run = trainer(folder, optim, "bf16")
    run.step(1, 1e-2)
    before = [np.array(a) for a in (*run.params().values(), *run._state().values())]
    run.arena.vector("grad")[:4] = np.nan
    run._train.run(run.program.segments.norm_update)
    after = [np.array(a) for a in (*run.params().values(), *run._state().values())]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))
    run.arena.vector("grad")[...] = 1.0
    run._train.run(run.program.segments.norm_update)  # the comparison can fail
    assert not np.array_equal(run.params()["wpe.weight"], before[list(run.params()).index("wpe.weight")])


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: SGD(momentum=1.0), r"momentum lies in \[0, 1\), but got 1.0"),
        (lambda: SGD(momentum=0.0, nesterov=True), "Nesterov's step has a momentum above 0"),
        (lambda: SGD(weight_decay=math.nan), "weight_decay is a number from 0 on, but got nan"),
        (lambda: Lion(betas=(0.9, 1.0)), r"both betas lie in \[0, 1\)"),
        (lambda: Adafactor(clip=-1.0), "clip is a number from 0 on"),
        (lambda: AdamW(moments="int4"), "moments are one of f32, bf16, int8, but got 'int4'"),
        (lambda: AdamW(moments="int8", scale_parameter=True), "scales by the parameter has moments f32, but got int8"),
        (lambda: optimizer_of(OptimConfig("lion", moments="int8")), "--moments is a setting of adamw"),
        (lambda: optimizer_of(OptimConfig("adafactor", eps=1e-6)), "--eps is a setting of adamw"),
        (lambda: optimizer_of(OptimConfig(nesterov=True)), "--nesterov is a setting of sgd"),
        (lambda: momentum_of(Config(optim=OptimConfig("sgd", momentum_warmup=2)), SGD(0.0)), "or sgd with a momentum"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(make, text):
    with pytest.raises(HandgradError, match=rf"\[optim\] .*{text}"):
        make()


def test_every_name_makes_its_optimizer_with_its_own_decay():
    decay = {"adamw": 0.1, "sgd": 0.0, "lion": 1.0, "adafactor": 0.0, "schedule_free": 0.1}
    made = {name: optimizer_of(OptimConfig(name)) for name in decay}
    assert {name: (type(o), o.weight_decay) for name, o in made.items()} == {
        name: (OPTIMIZERS[name], decay[name]) for name in decay
    }
