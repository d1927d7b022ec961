"""Muon: against an independent transcription and PyTorch over 50 steps; who is a hidden matrix; ranks, resuming, memory."""

from types import SimpleNamespace

import numpy as np
import pytest
from rank_threads import on_ranks

import handgrad as hg
from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.core.dtypes import F32
from handgrad.core.errors import HandgradError
from handgrad.core.params import ONES, normal
from handgrad.core.program import Program
from handgrad.models import T5, Bert, Gemma, GPTNeoX, Llama, declare, registry
from handgrad.ops.muon.reference import POLYNOMIALS
from handgrad.optim import AdamW, Muon, record_step
from handgrad.train.config import OptimConfig
from handgrad.train.explain import explain
from handgrad.train.optimizers import optimizer_of, optimizer_settings
from handgrad.train.show import groups

STEPS, LR, COLUMNS = 50, 2e-2, 12
EVERY = dict(row_scale=True, rescale=True, second_beta=0.9, cautious=True)
PARTS = {"tall": ((32, 1),), "wide": ((8, 1),), "qkv": ((12, 3), (8, 2), (8, 2)), "table": (), "bias": ()}
SHAPES = {name: (sum(rows for rows, _ in parts) or 20, COLUMNS) for name, parts in PARTS.items()} | {"bias": (40,)}


def rate(t):
    """The learning rate of step t, as the step scalars hold it."""
    return float(np.float32(LR / t**0.5))


def values(rng):
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


RNG = np.random.default_rng(0)
STARTS, GRADS = values(RNG), [values(RNG) for _ in range(STEPS)]


def ours(backend, **settings):
    """The weights after 50 updates."""
    p = Program(F32, trains=True)
    for name, shape in SHAPES.items():
        p.grad(p.param(name, shape, ONES if len(shape) == 1 else normal(1.0), PARTS[name]))
    optim = Muon(**dict(clip=0.0) | settings)
    record_step(p, optim)
    arena = backend.alloc(backend.plan(p))
    tensors = {name: info.tensor for name, info in p.params.items()}
    for name, w in STARTS.items():
        arena.view(tensors[name])[...] = w
    scalars, run = arena.scalars(p), backend.bind(p, arena)
    scalars.momentum = optim.scheduled_momentum
    for scalars.step, step in enumerate(GRADS, 1):
        scalars.lr = rate(scalars.step)
        for name, g in step.items():
            arena.view(p.grad(tensors[name]))[...] = g
        run.run(p.segments.norm_update)
    return {name: np.array(arena.view(t), np.float64) for name, t in tensors.items()}


def pieces(per_head):
    """The matrices: (parameter, rows)."""
    for name, parts in PARTS.items():
        row = 0
        for rows, heads in parts:
            each = rows // heads if per_head else rows
            for at in range(row, row + rows, each):
                yield name, slice(at, at + each)
            row += rows


def theirs(orthogonalize="polar_express", matrix_scale="adamw", per_head=False, matrix_rate=1.0, **switches):
    """The same in float64 by singular values, which the steps map one by one: no matrix product of ours."""
    weights = {name: w.astype(np.float64) for name, w in STARTS.items()}
    which = ["polar_express", "newton_schulz"].index(orthogonalize)
    margin, eps = ((1.02, 1e-6), (1.0, 1e-7))[which]
    for name, rows in pieces(per_head):
        w, buf, second = weights[name][rows], 0.0, 0.0
        m, n = w.shape
        for t, step in enumerate(GRADS, 1):
            g = step[name][rows].astype(np.float64)
            buf = 0.95 * buf + 0.05 * g
            g = 0.05 * g + 0.95 * buf
            if switches.get("row_scale"):
                g = g / np.linalg.norm(g, axis=1, keepdims=True)
            left, s, right = np.linalg.svd(g / (margin * np.linalg.norm(g) + eps), full_matrices=False)
            for a, b, c in POLYNOMIALS[which]:
                s = a * s + b * s**3 + c * s**5
            o = left * s @ right
            if switches.get("rescale"):
                o *= min(m, n) ** 0.5 / np.linalg.norm(o)
            if beta := switches.get("second_beta"):
                second = beta * second + (1 - beta) * np.mean(o**2, axis=1 if m >= n else 0, keepdims=True)
                even = o / second**0.5
                o = even * np.linalg.norm(o) / np.linalg.norm(even)
            lr = rate(t) * matrix_rate
            ratio = 0.2 * max(m, n) ** 0.5 if matrix_scale == "adamw" else max(1, m / n) ** 0.5
            w -= lr * 0.1 * w * ((o * w >= 0) if switches.get("cautious") else 1) + lr * ratio * o
    return weights


SWITCHES = [
    {},
    dict(orthogonalize="newton_schulz", matrix_scale="aspect", matrix_rate=3.0),
    *({name: value} for name, value in EVERY.items()),
    dict(per_head=True, **EVERY),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s) or "plain")
def test_fifty_steps_equal_an_independent_transcription(switches):
    """float64: rounding, 2^-53, is enlarged by at most the product of the polynomials' slopes at 0, below 1000 a step,
    and a step moves weights by less than 3 lr. Cautious decay jumps where a weight crosses 0: by lr^2 at most, which no
    weight of these does. float32 in the same way, from 2^-24."""
    exact, found, fast = theirs(**switches), ours(RefBackend(), **switches), ours(open_backend("cpu"), **switches)
    rest = ours(RefBackend(), matrix_scale="adamw")  # AdamW's parameters do not depend on the switches
    for name, parts in PARTS.items():
        if not parts:
            np.testing.assert_array_equal(found[name], rest[name])
            continue
        np.testing.assert_allclose(found[name], exact[name], rtol=0, atol=STEPS * 3 * LR * 1000 * 2.0**-53)
        np.testing.assert_allclose(fast[name], exact[name], rtol=0, atol=STEPS * 3 * LR * 1000 * 2.0**-24)


@pytest.mark.parametrize("scale", ["aspect", "adamw"])
def test_fifty_steps_equal_pytorch(scale, monkeypatch):
    """torch.optim.Muon and AdamW. Muon rounds to bf16 inside; here it works in float64, so that formulas are compared."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())
    adjust = {"aspect": "original", "adamw": "match_rms_adamw"}[scale]
    params = {(name, rows.start): torch.tensor(STARTS[name][rows].astype(np.float64)) for name, rows in pieces(False)}
    muon = torch.optim.Muon(params.values(), weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust)
    rest = {name: torch.tensor(STARTS[name].astype(np.float64)) for name, parts in PARTS.items() if not parts}
    groups = [{"params": [rest["table"]], "weight_decay": 0.3}, {"params": [rest["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for t, step in enumerate(GRADS, 1):
        for name, rows in pieces(False):
            params[name, rows.start].grad = torch.tensor(step[name][rows].astype(np.float64))
        for name, w in rest.items():
            w.grad = torch.tensor(step[name].astype(np.float64))
        for judge in (muon, adamw):
            for group in judge.param_groups:
                group["lr"] = rate(t)
            judge.step()
    found = ours(RefBackend(), orthogonalize="newton_schulz", matrix_scale=scale, embedding_decay=0.3)
    for name, rows in pieces(False):  # 1e-7, which torch does not add to the norm, changes it by 1e-7 of itself
        np.testing.assert_allclose(
            found[name][rows], params[name, rows.start].numpy(), rtol=0, atol=STEPS * 3 * LR * 1e-7
        )
    for name, w in rest.items():
        np.testing.assert_allclose(found[name], w.numpy(), rtol=1e-12, atol=1e-12)


def test_fifty_steps_of_normuon_equal_another_implementation(shards, monkeypatch):
    """pytorch_optimizer's NorMuon on the gradients of a GPT-2, q, k and v apart. It evens out rows always, as the paper
    does, where we take columns of wide matrices: it gets those transposed, and the scale 0.2 sqrt(max(m, n)) that does
    not change with that. It works in bf16 inside, here in float64, and does not add 1e-7 to the norm: its safety factor
    does.

    Rounding, 2^-53, is enlarged 1000 times at most, as above, in steps of less than 8 lr: 0.2 sqrt(96) times an
    orthogonal row, times at most 1 / sqrt(1 - 0.9) where a row grows suddenly."""
    torch, package = pytest.importorskip("torch"), pytest.importorskip("pytorch_optimizer.optimizer.muon.normuon")
    polar = package.zero_power_via_newton_schulz_5

    def exact(u, **kind):
        return polar(u, dtype=torch.float64, safety_factor=1 + 1e-7 / float(u.norm()), **kind)

    monkeypatch.setattr(package, "zero_power_via_newton_schulz_5", exact)
    muon = Muon(second_beta=0.9, orthogonalize="newton_schulz", clip=0.0)
    run = hg.Trainer(
        hg.models.GPT2(97, 8, 1, 2, 24),
        muon,
        hg.data.tokens(shards, 8, 32),
        execution=hg.Execution(4, extra_programs=()),
        precision=hg.Precision("f32"),
        backend=RefBackend(),
        start=hg.Start(3),
    )
    matrices = {name: info.parts for name, info in run.program.params.items() if info.parts}
    spans = [(name, slice(k * rows, (k + 1) * rows)) for name, p in matrices.items() for k, (rows, _) in enumerate(p)]

    def upright(arrays, name, rows):
        part = torch.tensor(np.array(arrays[name][rows], np.float64))
        return part if part.shape[0] >= part.shape[1] else part.T.contiguous()

    theirs = [torch.nn.Parameter(upright(run.params(), *span)) for span in spans]
    starts = [w.detach().clone() for w in theirs]
    group = dict(
        params=theirs, use_muon=True, momentum=0.95, beta2=0.9, weight_decay=0.1, use_adjusted_lr=True, eps=0.0
    )
    judge = package.NorMuon([group], foreach=False)
    for step in range(1, STEPS + 1):
        run.step(step, rate(step))
        for w, span in zip(theirs, spans):
            w.grad = upright(run.grads(), *span)
        judge.param_groups[0]["lr"] = rate(step)
        judge.step()
    assert len(theirs) == 6 and {tuple(w.shape) for w in theirs} == {(24, 24), (96, 24)}
    for w, start, span in zip(theirs, starts, spans):
        assert (w - start).abs().max() > LR
        found = upright(run.params(), *span).numpy()
        np.testing.assert_allclose(found, w.detach().numpy(), rtol=0, atol=STEPS * 8 * LR * 1000 * 2.0**-53)


SIZES = dict(vocab_size=97, max_seq_len=16, num_layers=1, num_heads=4, hidden_size=24)
FAMILIES = {  # the matrices of a block, with how many each stacks; all others are AdamW's
    "gpt2": (
        hg.models.GPT2(**SIZES, tie_embeddings=False),
        {"c_attn": 3, "attn.c_proj": 1, "c_fc": 1, "mlp.c_proj": 1},
    ),
    "llama": (Llama(**SIZES, num_kv_heads=2, qk_norm=True), {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}),
    "gemma": (Gemma(**SIZES, num_kv_heads=2), {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}),
    "gpt_neox": (GPTNeoX(**SIZES, rotary_pct=1.0), {"qkv": 3, "out": 1, "c_fc": 1, "c_proj": 1}),
    "bert": (Bert(**SIZES), {"qkv": 3, "out": 1, "up": 1, "down": 1}),
    "t5": (
        T5(**SIZES, gated=True, tie_embeddings=False),
        {"enc.0.attn.qkv": 3, "enc.0.attn.out": 1, "enc.0.mlp.gate_up": 2, "enc.0.mlp.down": 1, "dec.0.attn.qkv": 3}
        | {
            "dec.0.attn.out": 1,
            "dec.0.mlp.gate_up": 2,
            "dec.0.mlp.down": 1,
            "cross.q": 1,
            "cross.kv": 2,
            "cross.out": 1,
        },
    ),
}


def test_every_family_is_listed():
    assert set(FAMILIES) == set(registry.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_matrices_between_hidden_layers_are_muons(family):
    """Tables, heads, BERT's pooler and the layer before its head, T5's biases by distance, norms and biases are not.
    The parts of a packed matrix are those of whoever reads it: q, k, v by heads."""
    model, wanted = FAMILIES[family]
    params = declare(model).params
    group_of = Muon().groups.group_of
    found = {name: info.parts for name, info in params.items() if group_of(info) == "matrix"}
    assert len(found) == len(wanted) and sum(len(params[name].tensor.shape) == 2 for name in params) > len(found)
    for suffix, count in wanted.items():
        [(name, parts)] = [(name, parts) for name, parts in found.items() if name.endswith(f"{suffix}.weight")]
        assert len(parts) == count and sum(rows for rows, _ in parts) == params[name].tensor.shape[0]
        kv = 2 if family in ("llama", "gemma") else 4
        heads = {"qkv": (4, kv, kv), "c_attn": (4, 4, 4), "q": (4,), "kv": (4, 4)}
        assert tuple(h for _, h in parts) == heads.get(suffix.split(".")[-1], (1,) * count)
        rows = {rows // h for rows, h in parts}
        assert len(rows) == 1 and (suffix.split(".")[-1] not in heads or rows == {6})  # of a head


def llama():
    return Llama(97, 8, 2, 4, 2, 24, mlp_size=32)


def trainer(shards, comm=None, backend=None, micro_batch=12, zero=1, out=None, dtype="f32", **settings):
    backend = backend or RefBackend(comm=comm)
    return hg.Trainer(
        llama(),
        Muon(**settings),
        hg.data.tokens(shards, 8, 96),
        execution=hg.Execution(micro_batch=micro_batch, zero=zero, extra_programs=()),
        precision=hg.Precision(dtype),
        backend=backend,
        start=hg.Start(3),
        out=out,
    )


@pytest.fixture(scope="module")
def alone(shards):
    """What one rank trains, by settings."""
    found = {}

    def train(**settings):
        key = repr(settings)
        if key not in found:
            run = trainer(shards, on_ranks(1, lambda comm: comm)[0], **settings)
            losses = [run.step(k, 3e-3).loss for k in range(1, 5)]
            found[key] = (
                losses,
                {n: w.copy() for n, w in run.params().items()},
                {k: v.copy() for k, v in run._state().items()},
            )
        return found[key]

    return train


@pytest.mark.parametrize(("world", "zero"), [(2, 0), (2, 1), (3, 1), (2, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("settings", [{}, dict(per_head=True, **EVERY)], ids=["plain", "every"])
def test_ranks_train_as_one(world, zero, settings, shards, alone):
    """Weights and state of 4 steps in float64: gradients differ by rounding, 2^-53 of sums of a few hundred products, which
    the polynomials enlarge by at most 1000 a step."""

    def work(comm):
        run = trainer(shards, comm, micro_batch=12 // world, zero=zero, **settings)
        losses = [run.step(k, 3e-3).loss for k in range(1, 5)]
        params, state = run.params(), run._state()
        return losses, {n: w.copy() for n, w in params.items()}, {k: v.copy() for k, v in state.items()}

    found, one = on_ranks(world, work), alone(**settings)
    assert all(f[0] == found[0][0] for f in found)
    np.testing.assert_allclose(found[0][0], one[0], rtol=1e-10)
    assert found[0][2].keys() == one[2].keys()
    for mine, exact in zip(found[0][1:], one[1:]):
        for name, value in exact.items():
            np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-10, err_msg=name)


def test_resume_is_bit_exact(shards, tmp_path):
    """bf16 with low halves, momentum and mean squares of rows."""
    settings = dict(backend=open_backend("cpu"), dtype="bf16", out=tmp_path / "run", **EVERY)
    run = trainer(shards, **settings)
    for k in (1, 2):
        run.step(k, 3e-3)
    run.save(2)
    for k in (3, 4):
        run.step(k, 3e-3)
    whole = {n: np.array(w) for n, w in run.params().items()} | {k: np.array(v) for k, v in run._state().items()}
    run.close()
    again = trainer(shards, **settings)
    assert again.resume() == 2
    for k in (3, 4):
        again.step(k, 3e-3)
    resumed = again.params() | again._state()
    assert resumed.keys() == whole.keys() and any(name.startswith("state.squares.") for name in whole)
    assert all(np.array_equal(resumed[name], value) for name, value in whole.items())
    again.close()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_memory_is_planned_to_the_byte(dtype, shards):
    """v has no byte for matrices; a run allocates what explain plans."""
    backend, sizes = (
        open_backend("cpu"),
        dict(execution=hg.Execution(12, extra_programs=()), precision=hg.Precision(dtype)),
    )
    page = explain(llama(), 8, backend=backend, optim=Muon(), **sizes)
    assert page.plan.nbytes == trainer(shards, backend=backend, dtype=dtype).plan.nbytes
    matrices = sum(b.size for b in page.program.buckets if b.group == "matrix")
    size, vectors = page.program.flat_size, page.plan.vectors
    assert 0 < matrices < size and vectors["v"].size == size - matrices and vectors["m"].size == size
    assert ("low" in vectors) == (dtype == "bf16") and len(page.program.states) == 0


def test_gradients_that_are_not_finite_change_no_bit(shards):
    run = trainer(shards, backend=open_backend("cpu"), dtype="bf16", **EVERY)
    run.step(1, 3e-3)
    before = {n: np.array(w) for n, w in (run.params() | run._state()).items()}
    run.arena.view(run.program.grad(run.program.params["h.0.mlp.down.weight"].tensor))[0, 0] = np.nan
    run.arena.write_scalars(run.program, step=2, lr=3e-3)
    run._train.run(run.program.segments.norm_update)
    after = run.params() | run._state()
    assert all(np.array_equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "bad",
    [dict(momentum=1.0), dict(second_beta=1.0), dict(matrix_rate=-1.0), dict(embedding_decay=float("nan"))]
    + [dict(orthogonalize="svd"), dict(matrix_scale="none"), dict(eps=0.0), dict(betas=(0.9, 1.0))],
)
def test_settings_out_of_range_are_rejected(bad):
    with pytest.raises(HandgradError, match=r"\[optim\]"):
        Muon(**bad)


def test_matrices_of_an_odd_size_are_rejected():
    p = Program(F32, trains=True)
    p.grad(p.param("w", (3, 5), normal(1.0), ((3, 1),)))
    with pytest.raises(HandgradError, match=r"\[muon\] a matrix has a multiple of 4 elements, but got 3 x 5"):
        record_step(p, Muon())


def test_settings_name_muon_and_stand_for_it():
    optim = optimizer_of(OptimConfig(optimizer="muon", momentum=0.9, second_beta=0.95, embedding_decay=0.0))
    assert optim == Muon(0.9, second_beta=0.95, embedding_decay=0.0, betas=(0.9, 0.99))
    assert optimizer_of(OptimConfig(**optimizer_settings(optim))) == optim
    with pytest.raises(HandgradError, match=r"--per-head is a setting of muon, but got --optimizer adamw"):
        optimizer_of(OptimConfig(per_head=True))
    assert isinstance(optimizer_of(OptimConfig()), AdamW)


def test_a_run_prints_its_groups(shards):
    """Of a Llama of 2 layers: 4 packed matrices a block, the table, 2 norms a block and the last one."""
    run = trainer(shards, backend=RefBackend(), matrix_rate=2.0, embedding_decay=0.0)
    table = run.program.params["wte.weight"].tensor.size
    matrices = run.program.num_params - table - 5 * 24
    assert groups(SimpleNamespace(trainer=run)) == [
        ("optimizer", f"matrix: {matrices:,} parameters in 8 tensors; Muon, rate 2 x 0.2 sqrt(max(m, n)), decay 0.1"),
        ("", f"decay: {table:,} parameters in 1 tensors; AdamW, decay 0"),
        ("", "plain: 120 parameters in 5 tensors; AdamW, no decay"),
    ]


def test_a_run_without_a_hidden_matrix_that_learns_is_refused():
    """All of Muon's settings would be ignored."""
    model, muon = hg.models.GPT2(97, 8, 1, 2, 16), hg.optim.Muon()
    for tuning in ({"lora": hg.models.Lora(2)}, {"train_only": ("wte.*", "*.bias")}):
        with pytest.raises(hg.HandgradError, match="a hidden matrix learns.*--optimizer adamw"):
            hg.explain(model, 8, execution=hg.Execution(2, **tuning), optim=muon, remedies=False)
    part = hg.Execution(2, train_only=("h.0.*",))
    assert hg.explain(model, 8, execution=part, optim=muon, remedies=False).program.num_trainable > 0
