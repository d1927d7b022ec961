"""Frozen parameters: the same gradients as without them, nothing computed or held for them, on every backend and rank."""

import json
from fnmatch import fnmatchcase

import numpy as np
import pytest
from rank_threads import on_ranks

import handgrad as hg
from handgrad.backends import open_backend
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.core.backward import POLICIES, backward
from handgrad.core.errors import HandgradError
from handgrad.core.op import Phase
from handgrad.core.program import Program
from handgrad.models import GPT2, Bert, GPTNeoX, Llama, forward_loss
from handgrad.ops import add
from handgrad.testing import gradcheck, set_scalars
from handgrad.train.start import Start, initialize

SIZES = dict(vocab_size=97, max_seq_len=16, num_layers=2, num_heads=2, hidden_size=24)
MODELS = {
    "gpt2": GPT2(**SIZES),
    "untied, dropout": GPT2(**SIZES, tie_embeddings=False, dropout=0.2),
    "llama": Llama(**SIZES, num_kv_heads=1, qk_norm=True),
    "neox": GPTNeoX(**SIZES, rotary_pct=0.5),
    "bert": Bert(**SIZES, dropout=0.0),
}
PATTERNS = {
    "gpt2": ("wte.*", "wpe.*", "*.bias", "*.c_fc.weight", "ln_f.*", "h.1.*", "h.0.ln_2.weight"),
    "untied, dropout": ("lm_head.*", "h.0.mlp.*"),
    "llama": ("*_norm.weight", "*.qkv.weight", "h.1.ln_1.*"),
    "neox": ("h.1.ln_2.*", "*.bias"),
    "bert": ("h.1.*", "*.bias"),
}
CASES = [(name, pattern) for name, patterns in PATTERNS.items() for pattern in patterns]


def record(model, pattern="*", policy="none"):
    p = Program(trains=True, trainable=lambda name: fnmatchcase(name, pattern))
    forward_loss(p, model, 2, 16, 2)
    backward(p, add, drop=POLICIES[policy])
    return p


def gradients(model, backend, *args):
    p = record(model, *args)
    arena = backend.alloc(backend.plan(p))
    initialize(p, arena, Start(3))
    rng = np.random.default_rng(4)
    for info in p.params.values():  # away from the start: biases other than 0
        w = np.array(arena.read_part("param", info.tensor))
        w[: info.init.rows] += rng.normal(0, 0.1, w[: info.init.rows].shape).astype(w.dtype)
        arena.write_part("param", info.tensor, w)
    for t in p.inputs.values():
        arena.write(t, rng.random(t.shape) if t.dtype.unit else rng.integers(0, 16, t.shape))
    set_scalars(p, arena)
    backend.bind(p, arena).run()
    return p, {name: np.array(arena.read_part("grad", p.params[name].tensor)) for name in p.grads}


@pytest.mark.parametrize("name, pattern", CASES)
def test_gradients_are_those_of_the_whole_model(name, pattern):
    """Bit for bit, for every recompute policy, and of the matching parameters alone."""
    model, backend = MODELS[name], open_backend("cpu")
    _, whole = gradients(model, backend)
    for policy in POLICIES:
        p, found = gradients(model, backend, pattern, policy)
        assert set(found) == {n for n in p.params if fnmatchcase(n, pattern)} and found
        for n, g in found.items():
            np.testing.assert_array_equal(g, whole[n], err_msg=f"{n}, {policy}")


def calls(p):
    return [f"{c.block} {c.op.name}" for c in p.calls if c.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]


def test_nothing_is_computed_for_frozen_parameters():
    """The backward of the MLP of the last block alone, call by call: no weight gradient but its two, none below it."""
    p = record(MODELS["gpt2"], "h.1.mlp.*.weight", "act")
    assert calls(p) == [
        "head norm_backward",
        "h.1 linear_act",  # gelu(pre), which c_proj's gradient reads
        "h.1 linear_backward_w",
        "h.1 linear_backward_x",
        "h.1 linear_backward_w",
    ]
    (loss,) = [c for c in p.calls if c.op.starts_gradient]
    assert loss.dw is None and loss.dx is not None
    assert all(c.dw is None and c.db is None for c in p.calls if c.op.name == "norm_backward")
    first = [c for c in p.calls if c.block == "h.0" and c.op.name == "linear"]
    assert all(c.pre is None for c in first)  # no backward reads them
    p = record(MODELS["untied, dropout"], "lm_head.weight")
    (loss,) = [c for c in p.calls if c.op.starts_gradient]
    assert loss.dx is None and loss.dw is not None and calls(p) == []
    p = record(MODELS["gpt2"], "*.c_fc.bias", "act")  # biases need no inputs: x is not kept or made again
    assert all(c.x is None and c.dw is None for c in p.calls if c.op.name == "linear_backward_w")
    assert not any("linear_act" == c.op.name for c in p.calls)


def test_gradients_of_part_of_a_model_equal_finite_differences():
    for name, pattern in (("gpt2", "h.0.*"), ("llama", "*.ln_2.weight")):
        model = MODELS[name]

        def forward(p, model=model, pattern=pattern):
            p.trainable = lambda n: fnmatchcase(n, pattern)
            forward_loss(p, model, 1, 8, 1)

        def fill(p, arena):
            initialize(p, arena, Start(1))
            for t in p.inputs.values():
                arena.write(t, np.arange(t.size).reshape(t.shape) % 16)
            arena.write_scalars(p, loss_scale=1.0)

        assert gradcheck(forward, fill, samples=2) < 1e-5


def trainer(shards, *patterns, comm=None, backend=None, micro_batch=2, out=None, **changes):
    data = hg.data.tokens(shards, 16, 16 * 8)
    kinds = dict(micro_batch=micro_batch, train_only=patterns, extra_programs=()) | changes
    backend = backend or (RefBackend() if comm is None else RefBackend(comm=comm))
    precision = kinds.pop("precision", hg.Precision("f32"))
    execution = hg.Execution(**kinds)
    return hg.Trainer(
        MODELS["gpt2"], hg.optim.AdamW(), data, execution=execution, precision=precision, backend=backend, out=out,
        start=Start(3),
    )  # fmt: skip


def test_ranks_and_zero_stages_train_the_same(shards):
    """Two ranks and every stage against one, in float64: 1e-9 is far above its rounding, and below any lost gradient."""
    patterns = ("h.1.*weight", "ln_f.*")
    one = trainer(shards, *patterns)
    losses = [one.step(k, 3e-3).loss for k in (1, 2, 3)]
    want = one.params()
    for zero in (0, 1, 2, 3):

        def work(comm, zero=zero):
            run = trainer(shards, *patterns, comm=comm, zero=zero)
            found = [run.step(k, 3e-3).loss for k in (1, 2, 3)]
            return found, run.params(), {v.name: v.size for v in run.plan.vectors.values()}

        (found, params, sizes), _ = on_ranks(2, work)
        np.testing.assert_allclose(found, losses, rtol=1e-12)
        for name, w in want.items():
            np.testing.assert_allclose(params[name], w, rtol=0, atol=1e-9, err_msg=f"{name}, zero {zero}")
        assert sizes["grad"] * (2 if zero >= 2 else 1) < one.program.flat_size / 2


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_run_resumes_to_the_bit_and_holds_no_more_than_explained(shards, tmp_path, dtype):
    kinds = dict(backend=open_backend("cpu"), precision=hg.Precision(dtype), recompute="block")
    whole = trainer(shards, "h.1.*", out=tmp_path / "whole", **kinds)
    for k in (1, 2, 3, 4):
        whole.step(k, 1e-2)
    cut = trainer(shards, "h.1.*", out=tmp_path / "cut", **kinds)
    for k in (1, 2):
        cut.step(k, 1e-2)
    cut.save(2)
    cut.close()
    again = trainer(shards, "h.1.*", out=tmp_path / "cut", **kinds)
    before = {name: w.copy() for name, w in again.params().items()}
    assert again.resume() == 2
    for k in (3, 4):
        again.step(k, 1e-2)
    for name, w in whole.params().items():
        np.testing.assert_array_equal(again.params()[name], w)
        assert np.array_equal(w, before[name]) == (not name.startswith("h.1."))
    state = set(whole._state())
    vectors = ("m", "v") if dtype == "f32" else ("m", "v", "low")
    assert state == {f"{v}.{name}" for v in vectors for name in before if name.startswith("h.1.")}
    execution = hg.Execution(micro_batch=2, train_only=("h.1.*",), extra_programs=(), recompute="block")
    page = hg.explain(
        MODELS["gpt2"], 16, execution=execution, precision=kinds["precision"], backend=kinds["backend"],
        accumulation=4, remedies=False,
    )  # fmt: skip
    assert page.plan.nbytes == whole.plan.nbytes == len(whole.arena.memory())
    count = sum(t.size for t in (i.tensor for n, i in page.program.params.items() if n.startswith("h.1.")))
    held = sum(-(-i.tensor.size // 128) * 128 for n, i in page.program.params.items() if n.startswith("h.1."))
    assert page.program.num_trainable == count
    assert page.plan.region["grads"][1] == -(-4 * held // 256) * 256
    other = trainer(shards, "h.0.*", out=tmp_path / "cut", **kinds)
    with pytest.raises(
        HandgradError, match=r"the checkpoint's model has train_only \['h.1.\*'\], but got \['h.0.\*'\]"
    ):
        other.resume()


def test_a_pattern_that_matches_nothing_names_the_parameters(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--train-only", "h.3.*,h.9.*", "--backend", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "train_only matches parameters of the model: wte.weight, wpe.weight, h.*.ln_1.weight" in error
    assert "but got 'h.9.*'" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_line_trains_a_part_and_explains_its_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--backend", "cpu", "--dtype", "f32", "--micro-batch", "2", "--train-only", "ln_f.*,*.bias"]
    rest = ["--steps", "2", "--val-every", "0", "--sample-tokens", "0", "--out", "run"]
    assert main(["train", *sizes, *rest]) == 0
    assert "parameters" in (text := capsys.readouterr().out) and "learn" in text
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert main(["explain", "tiny", "--vocab-size", "65", "--no-sample", *sizes]) == 0
    page = capsys.readouterr().out
    assert f"trainable     {summary['trainable']:,}" in page
    total = next(line for line in page.splitlines() if line.startswith("total"))
    assert total.split()[1:] == (tmp_path / "run" / "memory.txt").read_text().splitlines()[5].split()[1:]
